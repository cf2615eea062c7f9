"""A cell is one method with its hyper-parameters at one retention: the unit that is compared, resumed and scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import vtc
from vtc.errors import BudgetError, InputError
from vtc.eval.method_spec import MethodSpec
from vtc.eval.spec import SweepSpec
from vtc.method.base import Compressor, Positions
from vtc.method.composite import Composite
from vtc.method.plugins import load_plugin
from vtc.method.registry import METHODS
from vtc.method.text import seeded, together

BASELINE = "none"


@dataclass(frozen=True)
class Cell:
    """One column of answers.

    `label` is what tables and figures show, `method` the registered name, ``none`` for the untouched model, and names
    with ``+`` between them for methods that act together.
    `parameters` are all hyper-parameters after defaults, so that a changed default is another cell. `positions` is the
    position policy, None for the method's own. `retention` is None for methods that decide themselves how much they
    keep, and where several together have retentions of their own. `model` is the fingerprint of the loaded model.
    `compressor` is the method to run, None for the baseline; it takes no part in comparisons because the other fields
    determine it.
    """

    label: str
    method: str
    version: int
    parameters: Mapping[str, Any]
    retention: float | None
    positions: Positions | None
    seed: int
    generation: Mapping[str, Any]
    model: Mapping[str, Any]
    compressor: Compressor | None = field(default=None, compare=False, repr=False)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the untouched model."""
        return self.compressor is None

    def record(self) -> dict[str, Any]:
        """All settings as JSON values, including the key."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "compressor"}
        return {"cell": self.key(), **settings}

    def key(self) -> str:
        """16 hexadecimal digits that change with every setting that can change an answer.

        The label and library versions take no part; a method's `version` stands for its code.
        """
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("compressor", "label"):
            settings.pop(name)
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=list)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def make_methods(spec: SweepSpec) -> list[tuple[MethodSpec, list[tuple[float | None, Compressor]]]]:
    """The entries of `spec` in its order, each with the retentions it runs at and the method object for each of them.

    A method that has a `seed` gets the sweep's unless its own is given. The retention is None for one that takes no
    budget and for several together that have their own; of several of which one takes a budget, it is that one's.

    Raises:
        UnknownName: a method that is not registered.
        VTCError: a hyper-parameter that the method does not have or refuses, a retention that is missing or too many.
    """
    for plugin in spec.plugins:
        load_plugin(plugin)
    return [(entry, _runs(entry, spec)) for entry in spec.methods if entry.name != BASELINE]


def _runs(entry: MethodSpec, spec: SweepSpec) -> list[tuple[float | None, Compressor]]:
    if isinstance(entry.compressor, Composite):
        for part in entry.compressor.parts:
            _not_taken(part)
        return [(None, entry.compressor)]
    if not entry.parts:
        method = _single(entry, spec)
        if not method.needs_budget:
            if entry.retention is not None:
                raise BudgetError(f"{entry.label!r} takes no retention; its hyper-parameters decide how much it keeps")
            return [(None, method)]
        return [(share, method) for share in _shares(entry, spec)]
    parts = [_single(part, spec) for part in entry.parts]
    own = [part.retention for part in entry.parts]
    if not any(part.needs_budget for part in parts) or any(share is not None for share in own):
        return [(None, together(parts, own, None))]
    return [(share, together(parts, own, share)) for share in _shares(entry, spec)]


def _shares(entry: MethodSpec, spec: SweepSpec) -> tuple[float, ...]:
    return spec.retentions if entry.retention is None else (entry.retention,)


def _single(entry: MethodSpec, spec: SweepSpec) -> Compressor:
    if entry.compressor is not None:
        return _not_taken(entry.compressor)
    return seeded(entry.name, entry.parameters, spec.seed)


def _not_taken(method: Compressor) -> Compressor:
    """Refuse an object under the name of another method: their answers would be stored as one cell's."""
    if method.name in vtc.list_methods() and METHODS.get(method.name) is not type(method):
        raise InputError(
            f"{type(method).__qualname__} has the name {method.name!r} of a registered method; give it another name"
        )
    return method


def make_cells(spec: SweepSpec, model: Mapping[str, Any]) -> list[Cell]:
    """The cells of `spec` for a model with this fingerprint: the baseline, then method by method; no cell twice.

    A method that takes no budget is one cell, whatever the retentions; so are several together with their own.
    """
    common: dict[str, Any] = {"seed": spec.seed, "generation": dict(spec.generation), "model": dict(model)}
    baseline = make_cell(BASELINE, None, 1.0, None, **common)
    cells = {baseline.key(): baseline}
    for entry, runs in make_methods(spec):
        for retention, method in runs:
            cell = make_cell(entry.label, method, retention, spec.positions, **common)
            cells.setdefault(cell.key(), cell)
    return list(cells.values())


def make_cell(
    label: str, method: Compressor | None, retention: float | None, positions: Positions | None, **common: Any
) -> Cell:
    """The cell of `method`, None for the untouched model; `common` are seed, generation and model."""
    if method is None:
        return Cell(BASELINE, BASELINE, 1, {}, 1.0, positions, **common)
    name = "+".join(part.name for part in method.parts) if isinstance(method, Composite) else method.name
    described = method.described()
    return Cell(label, name, method.version, described, retention, positions, compressor=method, **common)
