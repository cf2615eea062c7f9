"""PyramidDrop: fewer and fewer visual tokens from stage to stage of the LLM (arXiv:2410.17247)."""

from __future__ import annotations

from typing import Literal

from vtc.method.base import ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.readings import LLMReading
from vtc.method.registry import register
from vtc.method.schedule import scaled
from vtc.method.staged import StagedCompressor
from vtc.ops.host import put
from vtc.ops.select import top_k

LATE, EARLY = (8, 16, 24), (2, 10, 18)
"""Layers before which tokens are dropped, of 32: as published, and for budgets that those cannot meet."""
RankBy = Literal["own", "before"]


@register
class PyramidDrop(StagedCompressor):
    """Drop visual tokens before several layers of the LLM, keeping those the last prompt token attends to.

    Acts inside the LLM; training-free, follows the question. Before every layer l of the list (section 3.2) tokens are
    ranked by what the last prompt token pays to them in layer l, mean over heads, and lambda, lambda^2, lambda^3, ...
    of the tokens the LLM was given stay, in their order. The whole prompt is then numbered anew without gaps, except
    under multi-axis positions, and the KV cache of every layer holds what the layer saw.

    layers: the list; by default a quarter, half and three quarters of the depth (8, 16, 24 of 32), and for items whose
    budget these cannot meet (below about a quarter) 2, 10, 18 of 32, scaled to the depth. ratios: what each stage
    leaves; then no retention or keep is given and int(N * ratio) of N tokens stay, at least one. Published: 0.5, 0.25,
    0.125, which is a mean of 46.9 %. By default lambda is solved for by bisection, so that the mean over all layers
    meets the budget. schedule: instead of both, such as "sigmoid(8)", "cosine" or a rate for every layer. rank_by:
    "own" applies the norm and the projections of layer l to the rows that arrive there, as released, which costs these
    projections once more for all tokens; "before" takes the attention of layer l - 1, which has been computed anyway.

    Departures from the paper and its code: every image has its own share, where the release knows one image a
    prompt; newline tokens stay; the layers for small budgets are ours.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("pyramiddrop").plan(llava).stages
    (2, 8, 10, 16, 18, 24)
    >>> vtc.create("pyramiddrop", ratios=(0.5, 0.25, 0.125)).needs_budget
    False
    """

    rank_by: RankBy = "own"

    name = "pyramiddrop"
    version = 2
    published, published_ratios, rounds = LATE, (0.5, 0.25, 0.125), 0.0

    def lists(self, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
        if self.layers is not None:
            return (self.layers,)
        return tuple(scaled(each, model.llm_layers, first=1, nearest=round) for each in (LATE, EARLY))

    def plan(self, model: ModelSpec) -> Plan:
        stages = self.starts(model)
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
