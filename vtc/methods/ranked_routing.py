"""Ranked token routing: visual tokens skip single layers of the LLM by rank (after p-MoD, arXiv:2412.04449)."""

from __future__ import annotations

from typing import ClassVar

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.registry import register
from vtc.method.schedule import Rates, Schedule, check
from vtc.ops.host import put
from vtc.ops.select import top_k


@register
class RankedRouting(Compressor):
    """Let visual tokens skip single layers of the LLM: through each go those that the last prompt token attends to.

    Acts inside the LLM; training-free, follows the question. It is the progressive ratio decay of p-MoD without its
    routers: through layer l goes the share ``c_l = shift + cos(pi l / (L - 1)) / 2``, at least 0.15, of the visual
    tokens (section 3.3). Those are the tokens with the most attention of the last prompt token in layer l, mean over
    heads, computed from all rows that arrive there; the others go around that one layer unchanged, have no entry in its
    KV cache, and stand at the next layer's door again. Nothing leaves for good, positions stay, and decoding is plain.

    schedule: the decay, whose shift is solved for, so that the mean over the layers meets the budget; or the share of
    every layer, such as p-MoD's own with the shift 0.5, and then no retention or keep is given. layers: instead, the
    LLM layers that tokens may skip, from 1 on, numbered in this model, such as those whose attention has the lowest
    rank (`vtc.eval.training.attention_rank`, after gamma-MoD); all of them let the same share through.

    Ranking computes queries, keys and values of a layer once more for all tokens, which the accounts of costs include:
    about a quarter of a layer whose MLP is 2.7 times as wide as the rows.

    Departures from the paper and its code: p-MoD trains a router for each layer, ranks by it, and multiplies what
    leaves the MLP of chosen tokens, and all of the others, by its weight; here attention ranks, and the weight is 1.
    The first layer sees every token, and shares above 0.85 do not become 1. Every image has its own share; newline
    tokens skip nothing.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("ranked_routing").plan(llava).skips == tuple(range(1, 32))
    True
    >>> vtc.create("ranked_routing", layers=(8, 9)).plan(llava).skips
    (8, 9)
    """

    schedule: Rates | str = "cosine(0.15)"
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "ranked_routing"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.schedule)
        if self.layers is None:
            return
        if not self.layers or list(self.layers) != sorted({max(1, layer) for layer in self.layers}):
            raise VTCError(f"layers={self.layers!r} must rise and begin at 1 or later; such as those of lowest rank")
        if self.schedule != type(self).schedule:
            raise VTCError("schedule says which layers tokens skip and how many do; leave out layers beside it")

    @property
    def needs_budget(self) -> bool:
        return isinstance(self.schedule, str)

    def plan(self, model: ModelSpec) -> Plan:
        depth = model.llm_layers
        if depth < 2:
            raise UnsupportedMethod(f"the LLM of this {model.family} model has one layer, which sees every token")
        layers = tuple(range(min(self._schedule(model).starts), depth)) if self.layers is None else self.layers
        needs = Needs(llm=dict.fromkeys(layers, Rows.LAST_AHEAD))
        return Plan(layers, needs, "preserve", skips=layers)

    def least_retention(self, model: ModelSpec) -> float:
        return 1 - len(self.plan(model).skips) / model.llm_layers

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        counts = self.through(view, view.stage)
        if counts == view.items.counts:
            return None
        scores = view.llm_attention(view.stage, Rows.LAST_AHEAD)
        kept = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        return Selection(kept, counts=counts, scores=scores)

    def through(self, view: StageView, layer: int) -> tuple[int, ...]:
        """Tokens of each item that go through LLM layer `layer`."""
        items = view.items
        if self.layers is not None:
            return view.keep_from_layer(view.model.llm_layers - len(self.layers))
        schedule = self._schedule(view.model)
        granted = view.granted if self.needs_budget else items.entered
        columns = zip(items.counts, items.entered, granted, items.fixed, items.input_counts, strict=True)
        start = max(start for start in schedule.starts if start <= layer)
        return tuple(min(now, schedule.left(*item).get(start, now)) for now, *item in columns)

    def _schedule(self, model: ModelSpec) -> Schedule:
        return Schedule.read(self.schedule, model.llm_layers)
