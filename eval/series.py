"""Several sweeps in one file: other models, each on tasks of its own, with what they share written once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from vtc.errors import InputError
from vtc.eval.comparisons import Retained, ends, retained
from vtc.eval.results import Asked, Results, budget_order
from vtc.eval.spec import SweepSpec, make_spec
from vtc.eval.statistics import Floats
from vtc.eval.tables import nominal

KEY = "sweeps"


def make_series(
    settings: Mapping[str, Any], options: Mapping[str, Any] | None = None, *, source: str = "sweep"
) -> list[SweepSpec]:
    """The sweeps that `settings` ask for: one, or those under ``sweeps``, each with what the file says besides.

    `options` hold for every sweep, whatever `settings` say of it; of `video` they replace single fields. Each of
    several lies in a folder of `out` that has its `name`, or that of its model.

    Raises:
        InputError: what `make_spec` refuses, no list of mappings, a folder for one of several, or two of one name.

    >>> several = {"limit": 8, "out": "here", "sweeps": [{"model": "tiny-llava"}, {"name": "b", "model": "tiny-llava"}]}
    >>> [(str(spec.folder), spec.limit) for spec in make_series(several)]
    [('here/tiny-llava', 8), ('here/b', 8)]
    """
    options = options or {}
    if KEY not in settings:
        return [make_spec(_overridden(settings, options), source=source)]
    shared = {name: value for name, value in settings.items() if name != KEY}
    entries = settings[KEY]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise InputError(f"{source}: {KEY} is no list of settings; write for example {KEY}: [{{model: tiny-llava}}]")
    made: dict[Path, SweepSpec] = {}
    for number, entry in enumerate(entries, 1):
        if "out" in entry:
            raise InputError(
                f"{source}, sweep {number}: out {entry['out']!r} is that of one sweep of several, which lie side by"
                " side; write its name, and out beside the list"
            )
        own = _overridden({**shared, **entry}, options)
        name = str(own.pop("name", "") or Path(str(own.get("model", "tiny-llava"))).name)
        folder = Path(str(own.get("out", "results"))) / name
        if folder in made:
            raise InputError(
                f"{source}: two sweeps are called {name!r}; write a name: of its own in the entry of one of them"
            )
        made[folder] = make_spec({**own, "out": str(folder)}, source=f"{source}, sweep {number}")
    return list(made.values())


def _overridden(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `options` in the place of what they say."""
    made = {**settings, **options}
    before = settings.get("video") or {}
    if "video" in options:  # what is no mapping stays, and is refused as it would be alone
        made["video"] = {**before, **options["video"]} if isinstance(before, Mapping) else before
    return made


@dataclass(frozen=True)
class Overall:
    """A method at one budget over several sweeps.

    percent: of the untouched model's performance, the ratio of each task of each sweep, then their mean. sweeps, tasks:
    how many there are in it. low, high: 95 % bootstrap interval over questions, paired with the untouched model; sweeps
    that ask the same questions draw the same. None without scores by document.
    """

    method: str
    retention: Asked
    percent: float
    sweeps: int
    tasks: int
    low: float | None = None
    high: float | None = None


def overall(results: Sequence[Results]) -> list[Overall]:
    """Methods over several sweeps, the best of a budget first; only those that every sweep has at this budget."""
    found: dict[tuple[str, Asked], list[Retained]] = defaultdict(list)
    numbers: dict[tuple[str, str], int] = {}  # of everything that is asked, a task with its fingerprint
    for each in results:
        asked = {name: (name, task["fingerprint"]) for name, task in each.run["tasks"].items()}
        seeds = {name: numbers.setdefault(task, len(numbers)) for name, task in asked.items()}
        for line in retained(each, seeds):
            found[_bare(line.method), line.retention].append(line)
    made = []
    for (method, retention), by_sweep in found.items():
        if len(by_sweep) == len(results):
            tasks = [percent for line in by_sweep for percent in line.tasks.values()]
            low, high = ends(_mean(by_sweep))
            made.append(Overall(method, retention, fmean(tasks), len(by_sweep), len(tasks), low, high))
    return sorted(made, key=lambda entry: (budget_order(entry.retention), -entry.percent, entry.method))


def _mean(lines: Sequence[Retained]) -> Floats | None:
    """The mean over all tasks of all lines in each resample; None where that of a line is not known."""
    known = [line.resampled for line in lines if line.resampled is not None]
    if len(known) < len(lines):
        return None
    mean: Floats = np.average(known, axis=0, weights=[len(line.tasks) for line in lines])
    return mean


def _bare(method: str) -> str:
    """A method whose learned weights differ from model to model is one method."""
    return method.split("(weights=")[0]


def overall_table(entries: Sequence[Overall]) -> Table:
    """Methods x budgets for a terminal, each value above its interval, methods in the order of their means."""
    budgets = sorted({entry.retention for entry in entries}, key=budget_order)
    by_method: dict[str, dict[Asked, Overall]] = defaultdict(dict)
    for entry in entries:
        by_method[entry.method][entry.retention] = entry
    table = Table("method", title="over all sweeps", title_justify="left")
    for budget in budgets:
        table.add_column(nominal(budget), justify="right", no_wrap=True)
    for method, found in sorted(by_method.items(), key=lambda item: -fmean(e.percent for e in item[1].values())):
        cells = [_cell(found[budget]) if budget in found else "-" for budget in budgets]
        table.add_row(Text(method), *cells)
    return table


def _cell(entry: Overall) -> str:
    interval = "" if entry.low is None else f"\n{entry.low:.1f} to {entry.high:.1f}"
    return f"{entry.percent:.1f}{interval}"
