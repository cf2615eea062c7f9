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
from vtc.eval.downsample import DOWNSAMPLE
from vtc.eval.method_spec import MethodSpec
from vtc.eval.spec import Quantity, SweepSpec
from vtc.method.base import Compressor, Positions
from vtc.method.budget import Budget
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
    position policy, None for the method's own. `retention` or `keep` is the budget; both are None for methods that
    decide themselves how much they keep, and where several together have budgets of their own. `video` is what the
    sweep says of videos beyond the defaults. `model` is the fingerprint of the loaded model. `quantity` is what the
    retention is a share of; unless that is visual tokens, `setting` is the share of these with which it is met,
    `achieved` what that came to when it was looked for, and `asked` the key without them (see `vtc.eval.settling`).
    `compressor` is the method to run, None for the baseline and for `downsample`; it takes no part in comparisons
    because the other fields determine it.
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
    keep: int | None = None
    video: Mapping[str, Any] = field(default_factory=dict)
    quantity: Quantity = "tokens"
    setting: float | None = None
    achieved: float | None = field(default=None, compare=False)
    asked: str | None = field(default=None, compare=False)
    compressor: Compressor | None = field(default=None, compare=False, repr=False)

    @property
    def is_baseline(self) -> bool:
        """Whether this is the untouched model on the pictures as they are."""
        return self.method == BASELINE

    @property
    def budget(self) -> Budget | None:
        """The visual tokens that are asked for, once they are settled."""
        share = self.retention if self.setting is None else self.setting
        return None if share is None and self.keep is None else Budget(share, self.keep)

    @property
    def scales(self) -> Budget | None:
        """The budget to which pictures are scaled before the processor; None where they stay as they are."""
        return self.budget if self.method == DOWNSAMPLE else None

    def record(self) -> dict[str, Any]:
        """All settings as JSON values, including the key."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "compressor"}
        return {"cell": self.key(), **settings}

    def key(self) -> str:
        """16 hexadecimal digits that change with every setting that can change an answer.

        The label and library versions take no part; a method's `version` stands for its code.
        """
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("compressor", "label", "achieved", "asked"):
            settings.pop(name)
        if self.quantity == "tokens":
            settings.pop("quantity")
        for name in ("keep", "video", "setting"):  # which keys of older stores say nothing of
            if not settings[name]:
                settings.pop(name)
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), default=list)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


Run = tuple[Budget | None, Compressor | None]


def make_methods(spec: SweepSpec) -> list[tuple[MethodSpec, list[Run]]]:
    """The entries of `spec` in its order, each with the budgets it runs at and the method object for each of them.

    A method that has a `seed` gets the sweep's unless its own is given. The budget is None for one that takes none and
    for several together that have their own; of several of which one takes a budget, it is that one's. The object is
    None for `downsample`.

    Raises:
        UnknownName: a method that is not registered.
        VTCError: a hyper-parameter that the method does not have or refuses, a budget that is missing or too many.
    """
    for plugin in spec.plugins:
        load_plugin(plugin)
    return [(entry, _runs(entry, spec)) for entry in spec.methods if entry.name != BASELINE]


def _runs(entry: MethodSpec, spec: SweepSpec) -> list[Run]:
    if entry.name == DOWNSAMPLE:
        if entry.parameters or entry.positions:
            raise InputError(f"{entry.label!r}: {DOWNSAMPLE} has no hyper-parameters; write {DOWNSAMPLE}")
        return [(budget, None) for budget in _budgets(entry, spec)]
    if isinstance(entry.compressor, Composite):
        for part in entry.compressor.parts:
            _not_taken(part)
        return [(None, entry.compressor)]
    if not entry.parts:
        method = _single(entry, spec)
        if not method.needs_budget:
            if entry.budget is not None:
                raise BudgetError(
                    f"{entry.label!r} takes no retention or keep; its hyper-parameters decide how much it keeps"
                )
            return [(None, method)]
        return [(budget, method) for budget in _budgets(entry, spec)]
    parts = [_single(part, spec) for part in entry.parts]
    own = [part.budget for part in entry.parts]
    if not any(part.needs_budget for part in parts) or any(own):
        return [(None, together(parts, own, None))]
    return [(budget, together(parts, own, budget)) for budget in _budgets(entry, spec)]


def _budgets(entry: MethodSpec, spec: SweepSpec) -> list[Budget]:
    if entry.budget is not None:
        return [entry.budget]
    return [*(Budget(retention=share) for share in spec.retentions), *(Budget(keep=count) for count in spec.keep)]


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


def of_tokens(spec: SweepSpec) -> list[str]:
    """Methods of `spec` whose numbers or shares of visual tokens its `budget` of another quantity leaves as they are.

    Raises:
        BudgetError: there is nothing that it is about.
    """
    if spec.budget == "tokens":
        return []
    runs = [(entry, budget, method) for entry, made in make_methods(spec) for budget, method in made]
    if runs and all(budget is None or budget.retention is None for _, budget, _ in runs):
        raise BudgetError(
            f"budget {spec.budget!r} is what a retention is a share of, and none is given to a method here:"
            f" {', '.join(dict.fromkeys(entry.label for entry, *_ in runs))}; write retentions, or leave budget out"
        )
    found = []
    for entry, budget, method in runs:
        if budget is not None and budget.keep is not None:
            found.append(f"{entry.label} at {budget.keep} tokens")
        elif budget is None and isinstance(method, Composite) and any(method.budgets):
            found.append(entry.label)
    return found


def make_cells(spec: SweepSpec, model: Mapping[str, Any]) -> list[Cell]:
    """The cells of `spec` for a model with this fingerprint: the baseline, then method by method; no cell twice.

    A method that takes no budget is one cell, whatever the retentions; so are several together with their own.
    """
    common: dict[str, Any] = {
        "seed": spec.seed,
        "generation": dict(spec.generation),
        "model": dict(model),
        "video": spec.video.settings(),
    }
    baseline = make_cell(BASELINE, None, None, None, **common)
    cells = {baseline.key(): baseline}
    for entry, runs in make_methods(spec):
        for budget, method in runs:
            cell = make_cell(entry.label, method, budget, entry.positions or spec.positions, **common)
            if cell.retention is not None:
                cell = dataclasses.replace(cell, quantity=spec.budget)
            cells.setdefault(cell.key(), cell)
    return list(cells.values())


def make_cell(
    label: str, method: Compressor | None, budget: Budget | None, positions: Positions | None, **common: Any
) -> Cell:
    """The cell of `method`; None is the untouched model, on scaled pictures where `label` is that of `downsample`.

    `common` are seed, generation, model and video.
    """
    if method is None and label == DOWNSAMPLE:
        assert budget is not None
        return Cell(label, label, 1, {}, positions=None, **vars(budget), **common)
    if method is None:
        return Cell(BASELINE, BASELINE, 1, {}, 1.0, positions, **common)
    name = "+".join(part.name for part in method.parts) if isinstance(method, Composite) else method.name
    described = method.described()
    limits = {"retention": None, "keep": None} if budget is None else vars(budget)
    return Cell(label, name, method.version, described, positions=positions, compressor=method, **limits, **common)
