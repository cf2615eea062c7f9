"""Several sweeps in one file: other models, each on tasks of its own, with what they share written once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval.spec import SweepSpec, make_spec

KEY = "sweeps"


def make_series(settings: Mapping[str, Any], *, source: str = "sweep") -> list[SweepSpec]:
    """The sweeps that `settings` ask for: one, or those under ``sweeps``, each with what the file says besides.

    Each of several lies in a folder of `out` that has its `name`, or that of its model.

    Raises:
        InputError: what `make_spec` refuses, no list of mappings, or two sweeps of one name.

    >>> several = {"limit": 8, "out": "here", "sweeps": [{"model": "tiny-llava"}, {"name": "b", "model": "tiny-llava"}]}
    >>> [(str(spec.folder), spec.limit) for spec in make_series(several)]
    [('here/tiny-llava', 8), ('here/b', 8)]
    """
    if KEY not in settings:
        return [make_spec(settings, source=source)]
    shared = {name: value for name, value in settings.items() if name != KEY}
    entries = settings[KEY]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise InputError(f"{source}: {KEY} is no list of settings; write for example {KEY}: [{{model: tiny-llava}}]")
    made: dict[Path, SweepSpec] = {}
    for number, entry in enumerate(entries, 1):
        own = {**shared, **entry}
        name = str(own.pop("name", "") or Path(str(own.get("model", "tiny-llava"))).name)
        folder = Path(str(shared.get("out", "results"))) / name
        if folder in made:
            raise InputError(f"{source}: two sweeps are called {name!r}; give one of them another name")
        made[folder] = make_spec({**own, "out": str(folder)}, source=f"{source}, sweep {number}")
    return list(made.values())
