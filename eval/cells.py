"""A cell is one method with its hyper-parameters at one retention: the unit that is compared, resumed and scored."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import vtc
from vtc.compressor import Compressor, Positions
from vtc.eval.spec import MethodSpec, SweepSpec

BASELINE = "none"


@dataclass(frozen=True)
class Cell:
    """One column of answers.

    `label` is what tables and figures show, `method` the registered name, or ``none`` for the untouched model.
    `parameters` are all hyper-parameters after defaults, so that a changed default is another cell. `positions` is the
    position policy, None for the method's own. `retention` is None for methods that decide themselves how much they
    keep. `model` is the fingerprint of the loaded model. `compressor` is the
    method to run, None for the baseline; it takes no part in comparisons because the other fields determine it.
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


def make_methods(spec: SweepSpec) -> list[tuple[MethodSpec, Compressor]]:
    """The method objects of `spec`, in its order; one that has a `seed` gets the sweep's unless its own is given.

    Raises:
        UnknownName: a method that is not registered.
        VTCError: a hyper-parameter that the method does not have or refuses.
    """
    methods = []
    for entry in spec.methods:
        if entry.name == BASELINE:
            continue
        method = vtc.create(entry.name, **entry.parameters)
        if "seed" not in entry.parameters and "seed" in {f.name for f in dataclasses.fields(method)}:
            method = vtc.create(entry.name, **entry.parameters, seed=spec.seed)
        methods.append((entry, method))
    return methods


def make_cells(spec: SweepSpec, model: Mapping[str, Any]) -> list[Cell]:
    """The cells of `spec` for a model with this fingerprint: the baseline, then method by method; no cell twice.

    A method that takes no budget is one cell, whatever the retentions.
    """
    common: dict[str, Any] = {"seed": spec.seed, "generation": dict(spec.generation), "model": dict(model)}
    baseline = Cell(BASELINE, BASELINE, 1, {}, 1.0, None, **common)
    cells = {baseline.key(): baseline}
    for entry, method in make_methods(spec):
        for retention in spec.retentions if method.needs_budget else (None,):
            cell = Cell(
                label=_label(entry),
                method=method.name,
                version=method.version,
                parameters=method.described(),
                retention=retention,
                positions=spec.positions,
                compressor=method,
                **common,
            )
            cells.setdefault(cell.key(), cell)
    return list(cells.values())


def _label(entry: MethodSpec) -> str:
    given = ", ".join(f"{name}={value}" for name, value in entry.parameters.items())
    return f"{entry.name}({given})" if given else entry.name
