"""PyramidDrop: fewer and fewer visual tokens from stage to stage of the LLM (arXiv:2410.17247)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.budget import left_by_stages
from vtc.method.readings import LLMReading
from vtc.method.registry import register
from vtc.ops.host import put
from vtc.ops.select import top_k

LATE, EARLY = (8, 16, 24), (2, 10, 18)
"""Layers before which tokens are dropped, of 32: as published, and for budgets that those cannot meet."""
DEPTH = 32
RankBy = Literal["own", "before"]


@register
class PyramidDrop(Compressor):
    """Drop visual tokens before several layers of the LLM, keeping those the last prompt token attends to.

    Acts inside the LLM; training-free, follows the question. Before every layer l of the list (section 3.2) tokens are
    ranked by what the last prompt token pays to them in layer l, mean over heads, and lambda, lambda^2, lambda^3, ...
    of the tokens the LLM was given stay, in their order. The whole prompt is then numbered anew without gaps, except
    under multi-axis positions, and the KV cache of every layer holds what the layer saw.

    layers: the list; by default a quarter, half and three quarters of the depth (8, 16, 24 of 32), and for items whose
    budget these cannot meet (below about a quarter) 2, 10, 18 of 32, scaled to the depth. ratios: what each stage
    leaves; then no retention or keep is given and int(N * ratio) of N tokens stay, at least one. Published: 0.5, 0.25,
    0.125, which is a mean of 46.9 %. By default lambda is solved for by bisection, so that the mean over all layers
    meets the budget. rank_by: "own" applies the norm and the projections of layer l to the rows that arrive there, as
    released, which costs these projections once more for all tokens; "before" takes the attention of layer l - 1, which
    has been computed anyway.

    Departures from the paper and its code: every image has its own share, where the release knows one image a
    prompt; newline tokens stay; the layers for small budgets are ours.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("pyramiddrop").plan(llava).stages
    (2, 8, 10, 16, 18, 24)
    >>> vtc.create("pyramiddrop", ratios=(0.5, 0.25, 0.125)).needs_budget
    False
    """

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    rank_by: RankBy = "own"

    name = "pyramiddrop"
    version = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (not self.layers or self.layers[0] < 1 or not _rising(self.layers)):
            raise VTCError(
                f"layers={self.layers!r} must rise and begin at 1 or later, since these stages lie inside the LLM; the "
                "paper uses (8, 16, 24) of 32"
            )
        if self.ratios is not None:
            falling = all(first >= second for first, second in pairwise(self.ratios))
            if not self.ratios or not falling or not 0 < self.ratios[-1] <= self.ratios[0] < 1:
                raise VTCError(
                    f"ratios={self.ratios!r} must fall and lie between 0 and 1: each is a share of the tokens before "
                    "the first stage; the paper uses (0.5, 0.25, 0.125)"
                )
            stages = len(self.layers or LATE)
            if stages != len(self.ratios):
                raise VTCError(f"{len(self.ratios)} ratios for {stages} layers; give one for each")

    @property
    def needs_budget(self) -> bool:
        return self.ratios is None

    def lists(self, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
        """Lists of layers for this model; an item takes the first that can meet its budget."""
        if self.layers is not None:
            return (self.layers,)
        if model.llm_layers < 2:
            raise UnsupportedMethod(
                f"the LLM of this {model.family} model has one layer; nothing can be dropped inside"
            )
        lists = tuple(_scaled(each, model.llm_layers) for each in (LATE, EARLY))
        if self.ratios is None:
            return lists
        if len(lists[0]) != len(self.ratios):
            raise UnsupportedMethod(
                f"{len(self.ratios)} ratios for an LLM of {model.llm_layers} layers, which by default has "
                f"{len(lists[0])} stages; pass as many layers"
            )
        return lists[:1]

    def plan(self, model: ModelSpec) -> Plan:
        stages = tuple(sorted({layer for each in self.lists(model) for layer in each}))
        needs = Needs(llm=dict(self.reading(stage) for stage in stages))
        return Plan(stages, needs, "preserve" if model.mrope else "compact")

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        counts = self.left(view, view.stage)
        if counts == view.items.counts:
            return None
        keep = put(counts, view.device)
        scores = view.llm_attention(*self.reading(view.stage))
        return Selection(top_k(scores, keep, view.items.gaps, most=max(counts)), counts=counts, scores=scores)

    def reading(self, stage: int) -> tuple[int, LLMReading]:
        """The LLM layer and what of it ranks the tokens before layer `stage`."""
        return (stage, Rows.LAST_AHEAD) if self.rank_by == "own" else (stage - 1, Rows.LAST)

    def left(self, view: StageView, layer: int) -> tuple[int, ...]:
        """Tokens that each item has behind the stage before `layer`."""
        items = view.items
        if self.ratios is not None:
            share = dict(zip(self.lists(view.model)[0], self.ratios, strict=True))[layer]
            wanted = [max(1, int(entered * share)) for entered in items.entered]
        else:
            columns = zip(items.entered, items.fixed, items.input_counts, view.granted, items.counts, strict=True)
            wanted = [self._scheduled(view.model, *item).get(layer, item[-1]) for item in columns]
        return tuple(min(now, count) for now, count in zip(items.counts, wanted, strict=True))

    def _scheduled(
        self, model: ModelSpec, entered: int, fixed: int, given: int, granted: int, now: int
    ) -> dict[int, int]:
        """Layer -> tokens left behind the stage before it, for an item of which `entered` tokens came to the LLM."""
        if not entered or granted >= entered + fixed:
            return {}

        def counts(layers: tuple[int, ...]) -> dict[int, int]:
            spans = tuple(after - before for before, after in pairwise((0, *layers, model.llm_layers)))
            return dict(zip(layers, left_by_stages(entered, 1, granted, fixed, given, spans), strict=True))

        *rather, last = self.lists(model)
        for layers in rather:
            with contextlib.suppress(BudgetError):
                return counts(layers)
        return counts(last)


def _rising(layers: Sequence[int]) -> bool:
    return all(first < second for first, second in pairwise(layers))


def _scaled(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Layers of 32 as those of an LLM of `depth` layers, each at least one layer behind the one before."""
    return tuple(sorted({min(depth - 1, max(1, round(layer * depth / DEPTH))) for layer in layers}))
