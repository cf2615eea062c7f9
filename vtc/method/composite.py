"""Several methods on one model, each at stages of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import nn

from vtc.errors import BudgetError, UnsupportedMethod, VTCError, shown
from vtc.method.base import (
    CacheStage,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Positions,
    Selection,
    Stage,
    StageView,
)
from vtc.method.budget import Budget


def _order(stage: Stage) -> tuple[int, int]:
    """When a stage is reached: inside the encoder, before and inside the LLM, after the prefill."""
    if isinstance(stage, EncoderStage):
        return 0, stage.layer
    return (2, stage.from_layer) if isinstance(stage, CacheStage) else (1, stage)


@dataclass(frozen=True)
class Composite(Compressor):
    """Methods that act one after the other; what `vtc.compress` makes of a list.

    parts: in any order, each at other stages. budgets: of each part, None for those that need none. The budget of the
    part that acts first is a share of the input's tokens, that of a later one a share of the tokens that reach it.
    """

    parts: tuple[Compressor, ...]
    budgets: tuple[Budget | None, ...]

    name: ClassVar[str] = "composite"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or not all(isinstance(part, Compressor) for part in self.parts):
            raise VTCError(f"parts={shown(self.parts)} are no methods; write for example (vtc.create('vtc_cls'),)")
        fits = len(self.budgets) == len(self.parts) and all(
            isinstance(budget, Budget) if part.needs_budget else budget is None
            for part, budget in zip(self.parts, self.budgets, strict=True)
        )
        if not fits:
            raise BudgetError(
                f"budgets={shown(self.budgets)} do not fit {len(self.parts)} methods; write one vtc.Budget for each "
                "that takes a budget and None for each other"
            )

    @property
    def needs_budget(self) -> bool:
        return False

    def described(self) -> dict[str, Any]:
        return {
            "parts": [
                {"method": part.name, "version": part.version, **part.described(), "budget": budget and vars(budget)}
                for part, budget in zip(self.parts, self.budgets, strict=True)
            ]
        }

    @property
    def combined(self) -> Budget | None:
        """The retention of all parts together; None unless each part with a budget has a retention."""
        given = [budget for budget in self.budgets if budget is not None]
        shares = [budget.retention for budget in given if budget.retention is not None]
        return Budget(retention=prod(shares)) if shares and len(shares) == len(given) else None

    def keeps_all(self, budget: Budget | None, tokens: int) -> bool:
        return all(part.keeps_all(own, tokens) for part, own in zip(self.parts, self.budgets, strict=True))

    def reads(self, model: ModelSpec, layer: int, memory: dict[Any, Any]) -> bool:
        own = [memory.get(number, {}) for number in range(len(self.parts))]
        reading = [part for part in zip(self.parts, own, strict=True) if layer in part[0].plan(model).needs.llm]
        return any(part.reads(model, layer, kept) for part, kept in reading)

    def module(self, model: ModelSpec) -> nn.Module | None:
        modules = {str(number): part.module(model) for number, part in enumerate(self.parts)}
        learned = {number: module for number, module in modules.items() if module is not None}
        return nn.ModuleDict(learned) if learned else None

    def plan(self, model: ModelSpec) -> Plan:
        plans = [part.plan(model) for part in self.parts]
        owner: dict[Stage, Compressor] = {}
        for part, plan in zip(self.parts, plans, strict=True):
            for stage in plan.stages:
                key = CacheStage() if isinstance(stage, CacheStage) else stage
                if owner.get(key, part) is not part:
                    raise UnsupportedMethod(
                        f"{owner[key].name!r} and {part.name!r} both act at {stage}; combine methods at different "
                        "stages, or switch that stage of one of them off"
                    )
                owner[key] = part
        inside = [
            part.name
            for part, plan, budget in zip(self.parts, plans, self.budgets, strict=True)
            if budget is not None and min(map(_order, plan.stages)) > (1, 0)
        ]
        if len(inside) > 1:
            raise UnsupportedMethod(
                f"{' and '.join(map(repr, inside))} each take a budget inside the LLM, where a budget is a mean over "
                "all layers; give a budget to one of them"
            )
        needs = Needs()
        for plan in plans:
            needs = needs | plan.needs
        stages = tuple(sorted((stage for plan in plans for stage in plan.stages), key=_order))
        inner = [plan for plan in plans if any(isinstance(stage, EncoderStage) for stage in plan.stages)]
        restores = bool(inner) and all(plan.restores for plan in inner)
        skips = tuple(sorted(layer for plan in plans for layer in plan.skips))
        gains = any(plan.gains for plan in plans)
        return Plan(stages, needs, _positions(plans), restores=restores, skips=skips, gains=gains)

    def select(self, view: StageView) -> Selection | None:
        plans = [part.plan(view.model) for part in self.parts]
        (number,) = [number for number, plan in enumerate(plans) if view.stage in plan.stages]
        starts = [min(map(_order, plan.stages)) for plan in plans]
        memory: dict[Any, Any] = view.memory.setdefault(number, {})
        base = view.items.input_counts
        if starts[number] > min(starts):
            now = view.items.entered if _order(view.stage) > (1, 0) else view.items.counts
            reached = tuple(count + fixed for count, fixed in zip(now, view.items.fixed, strict=True))
            base = memory.setdefault("tokens that reached it", reached)
        modules = view.module
        mine = dataclasses.replace(
            view,
            budget=self.budgets[number],
            items=dataclasses.replace(view.items, input_counts=base),
            needs=plans[number].needs,
            memory=memory,
            module=modules[str(number)] if isinstance(modules, nn.ModuleDict) and str(number) in modules else None,
        )
        return self.parts[number].select(mine)


def _positions(plans: Sequence[Plan]) -> Positions:
    """The common policy; where parts differ, tokens are renumbered only before the LLM, or not at all."""
    policies = {plan.positions for plan in plans}
    if len(policies) == 1:
        return policies.pop()
    early = {plan.positions for plan in plans if min(map(_order, plan.stages)) <= (1, 0)}
    return "preserve" if "preserve" in early or not early else "compact_input"


def combine(
    methods: Sequence[Compressor],
    retention: float | Sequence[float | None] | None,
    keep: int | Sequence[int | None] | None,
) -> Composite:
    """The composite of `methods` with one budget for each that needs one.

    retention, keep: one value per method in their order, None where a method takes none; a single value goes to the
    only method that needs a budget. Raises BudgetError for anything else.
    """
    wanting = [method.name for method in methods if method.needs_budget]

    def spread(name: str, given: Any) -> list[Any]:
        if given is None:
            return [None] * len(methods)
        if isinstance(given, Sequence) and not isinstance(given, str):
            if len(given) != len(methods):
                raise BudgetError(
                    f"{name} has {len(given)} entries for {len(methods)} methods; write one per method, None for those "
                    "that take no budget"
                )
            return list(given)
        if len(wanting) != 1:
            raise BudgetError(
                f"one {name} given for {len(wanting)} methods that take a budget ({', '.join(wanting) or 'none'}); "
                f"write a list with one entry per method, for example {name}=[0.5, None]"
            )
        return [given if method.needs_budget else None for method in methods]

    budgets: list[Budget | None] = []
    for method, share, count in zip(methods, spread("retention", retention), spread("keep", keep), strict=True):
        if not method.needs_budget and (share is not None or count is not None):
            raise BudgetError(f"{method.name!r} takes no retention or keep; write None in its place")
        budgets.append(Budget(share, count) if method.needs_budget else None)
    return Composite(tuple(methods), tuple(budgets))
