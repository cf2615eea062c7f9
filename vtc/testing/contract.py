"""The contract every method keeps on every model, as checks that return what they measured.

Pruning equals the unpruned model with the dropped tokens masked out; a batch equals its rows alone; what stands behind
an item's end, padding side and generation mode do not matter; text-only prompts and retention 1.0 are bit-identical;
the counts a method tells are those of what it keeps; nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from vtc import adapters
from vtc.app.pages import Table
from vtc.engine.attach import compress
from vtc.engine.handle import Handle
from vtc.method.base import AFTER_PREFILL, CacheStage, Compressor, EncoderStage, ModelSpec, Positions
from vtc.method.learned import LearnedCompressor
from vtc.method.registry import create
from vtc.method.weights import SUFFIX
from vtc.testing.measures import (
    MODES,
    against_oracle,
    batch_against_singles,
    generate,
    gradients,
    half_precision,
    identical,
    layouts,
    modes,
    no_trace,
    only_the_prompt,
    right_padding,
    ties,
    two_turns,
)
from vtc.testing.models import TINY_MODELS, Part, tiny_inputs, tiny_model
from vtc.testing.padding import reads_padding
from vtc.testing.pairs import with_tiny_pair
from vtc.testing.probes import FixedKeep, LastRowTopK
from vtc.testing.reference import reference
from vtc.testing.selections import false_counts
from vtc.testing.tiny_llava_onevision import unshrunk

__all__ = [
    "LIMIT",
    "MODES",
    "Deviation",
    "against_oracle",
    "batch_against_singles",
    "check_adapter",
    "check_method",
    "generate",
    "identical",
    "modes",
    "no_trace",
    "raise_on_failure",
    "reference",
    "two_turns",
    "with_fresh_weights",
    "worst",
    "worst_by",
]

LIMIT = 5e-5
"""Largest difference of logits allowed in float32; measured noise is below 2e-5, a wrong mask moves them by units."""


@dataclass(frozen=True)
class Deviation:
    """One cell of the contract: the worst difference found and the limit it has to stay within."""

    method: str
    model: str
    check: str
    worst: float
    limit: float

    @property
    def passed(self) -> bool:
        """Within the limit; NaN never passes."""
        return self.worst <= self.limit


def check_method(
    method: str | Compressor,
    *,
    models: Sequence[str] | None = None,
    retention: float = 0.5,
    policies: Sequence[Positions] = ("preserve", "compact"),
    generation: Collection[str] = tuple(MODES),
    steps: int = 8,
) -> list[Deviation]:
    """Run the whole contract for a method on tiny models; AssertionError names every cell that fails.

    method: a registered name or an object; learned methods without weights get fresh ones of the right shape, those
    that need a CLIP pair and have none one that fits.
    models: names from TINY_MODELS, all by default. generation: names from MODES to compare with the oracle.
    """
    chosen = create(method) if isinstance(method, str) else method
    cells: list[Deviation] = []
    for name in models or TINY_MODELS:
        model = tiny_model(name)
        resolved, told = with_tiny_pair(with_fresh_weights(chosen, adapters.of(model).spec), name)
        budget = {"retention": retention} if resolved.needs_budget else {}
        check = _Check(resolved, name, model, budget, told, steps)
        plan = resolved.plan(adapters.of(model).spec)
        inside = any(isinstance(stage, EncoderStage) for stage in plan.stages) and not plan.restores
        with unshrunk() if inside else nullcontext():  # a picture whose map is resized is refused there
            cells += check.run(policies, generation)
    raise_on_failure(cells)
    return cells


@dataclass(frozen=True, eq=False)
class _Check:
    """The contract of one method on one model."""

    method: Compressor
    name: str
    model: Any
    budget: dict[str, Any]
    told: dict[str, Any]
    steps: int

    def run(self, policies: Sequence[Positions], generation: Collection[str]) -> list[Deviation]:
        cells = self._counts(policies[-1])
        if not all(cell.passed for cell in cells):
            return cells  # the engine trusts counts: what follows would end in any error
        for layout_name, layout in layouts(self.name).items():
            cells += [
                self._cell(f"{layout_name}: {c}", *found) for c, *found in self._batch(layout, policies, generation)
            ]
        cells += [self._cell(f"{layout_name}: {c}", *found) for c, *found in self._whole_batch(layout, policies[-1])]
        for kind in TINY_MODELS[self.name].kinds:
            for policy in policies:
                worst = two_turns(self.model, self.name, kind, self._attach(policy), self.steps)
                cells.append(self._cell(f"{kind}: two turns, {policy}", worst))
        if "image" in TINY_MODELS[self.name].kinds:
            for policy in policies:
                worst = ties(self.model, self.name, self._attach(policy))
                cells.append(self._cell(f"image: batch = singles on ties, {policy}", worst))
        text: list[list[Part]] = [[9], [5]]
        inputs = tiny_inputs(self.name, text, model=self.model)
        cells.append(
            self._cell(
                "text only, bit-identical",
                identical(self.model, inputs, self._attach(policies[-1]), self.steps),
                0.0,
            )
        )
        return cells

    def _counts(self, policy: Positions) -> list[Deviation]:
        batches = {
            name: tiny_inputs(self.name, layout, seed=3, extra=1, model=self.model)
            for name, layout in layouts(self.name).items()
        }
        return [
            self._cell(f"{name}: counts are those of keep", false_counts(self.model, inputs, self._attach(policy)), 0.0)
            for name, inputs in batches.items()
        ]

    def _batch(
        self, layout: list[list[Part]], policies: Sequence[Positions], generation: Collection[str]
    ) -> Iterator[tuple[str, float, float]]:
        """(check, worst, limit) of everything in which batches of other items differ."""
        model, inputs = self.model, tiny_inputs(self.name, layout, seed=3, extra=1, model=self.model)
        for policy in policies:
            attach = self._attach(policy)
            for mode, options in modes(model).items():
                if mode in generation:
                    worst = against_oracle(model, inputs, attach, self.steps, **options)
                    yield f"oracle, {policy}, {mode}", worst, LIMIT
            worst = batch_against_singles(model, self.name, layout, attach, self.steps)
            yield f"batch = singles, {policy}", worst, LIMIT
            yield f"right = left padding, {policy}", right_padding(model, self.name, layout, attach), LIMIT

    def _whole_batch(self, layout: list[list[Part]], policy: Positions) -> Iterator[tuple[str, float, float]]:
        """(check, worst, limit) of what one batch with every kind of item shows."""
        model, inputs = self.model, tiny_inputs(self.name, layout, seed=3, extra=1, model=self.model)
        attach = self._attach(policy)
        yield "answers are no prompt", only_the_prompt(model, inputs, attach), 0.0
        yield "reads no padding", reads_padding(model, inputs, attach), LIMIT
        if self.method.needs_budget:
            yield "retention 1.0, bit-identical", identical(model, inputs, self._whole, self.steps), 0.0
        yield "nothing left behind", no_trace(model, inputs, attach), 0.0
        yield "gradients reach the projector", gradients(model, inputs, attach), 0.0
        yield "bfloat16 runs", half_precision(model, inputs, attach), 0.0

    def _attach(self, policy: Positions) -> Callable[..., Handle]:
        return lambda model, **more: compress(model, self.method, positions=policy, **self.budget, **self.told, **more)

    def _whole(self, model: Any) -> Handle:
        return compress(model, self.method, retention=1.0)

    def _cell(self, check: str, worst: float, limit: float = LIMIT) -> Deviation:
        return Deviation(self.method.name, self.name, check, worst, limit)


D = TypeVar("D", bound=Deviation)


def worst(cells: Iterable[Deviation]) -> str:
    """The largest deviation for a table, `-` where there is none."""
    found = [cell.worst for cell in cells]
    if not found:
        return "-"
    return f"{max(found):.1e}" if max(found) else "0"


def worst_by(by: str, cells: Sequence[D], models: Sequence[str], show: Callable[[Iterable[D]], str] = worst) -> Table:
    """What `show` makes of the cells, one row for each "method" or "check", which is `by`, and one column per model."""
    rows = []
    for name in dict.fromkeys(getattr(cell, by) for cell in cells):
        these = [cell for cell in cells if getattr(cell, by) == name]
        rows.append([name, *(show([cell for cell in these if cell.model == model]) for model in models)])
    return [by, *models], rows


def with_fresh_weights(method: Compressor, model: ModelSpec, folder: Path | None = None) -> Compressor:
    """A learned method without weights with seeded fresh ones for `model`; any other method as it is."""
    if not isinstance(method, LearnedCompressor) or method.weights is not None or method.training:
        return method
    folder = folder or Path(tempfile.mkdtemp(prefix="vtc-weights-"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = method.build(model)
    path = method.save(folder / f"{method.name}-{model.family}{SUFFIX}", module, model)
    return dataclasses.replace(method, weights=str(path))


def check_adapter(name: str, *, steps: int = 8) -> list[Deviation]:
    """Run the contract on one tiny model with probe methods at every kind of stage."""
    cells: list[Deviation] = []
    for at in ((0,), (2,), (0, 2), (0, 1, 3), (0, AFTER_PREFILL), (1, CacheStage(2))):
        cells += check_method(FixedKeep(at=at), models=[name], steps=steps)
    cells += check_method(FixedKeep(at=(0, 2), static=False), models=[name], steps=steps)
    cells += check_method(FixedKeep(at=(1, 2, 3), skips=(1, 3)), models=[name], steps=steps)
    cells += check_method(LastRowTopK(), models=[name], steps=steps, retention=0.7)
    return cells


def raise_on_failure(cells: Sequence[Deviation]) -> None:
    """AssertionError that names every cell above its limit."""
    failed = [cell for cell in cells if not cell.passed]
    lines = [f"{c.method} on {c.model}: {c.check}: {c.worst:.2e} exceeds {c.limit:.0e}" for c in failed]
    assert not failed, "contract broken:\n" + "\n".join(lines)
