"""Ranked token routing: visual tokens skip single layers of the LLM by rank (after p-MoD, arXiv:2412.04449)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vtc.method.base import ModelSpec, Needs, Plan, Rows, StageView
from vtc.method.registry import register
from vtc.method.routed import RoutedCompressor


@register
class RankedRouting(RoutedCompressor):
    """Let visual tokens skip single layers of the LLM: through each go those that the last prompt token attends to.

    Acts inside the LLM; training-free, follows the question. It is the progressive ratio decay of p-MoD without its
    routers (those are `p_mod`): through layer l goes the share ``c_l = shift + cos(pi l / (L - 1)) / 2``, at least
    0.15, of the visual tokens (section 3.3). Those are the tokens with the most attention of the last prompt token in
    layer l, mean over heads, computed from all rows that arrive there; the others go around that one layer unchanged,
    have no entry in its KV cache, and stand at the next layer's door again. Nothing leaves for good, positions stay,
    and decoding is plain.

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

    name: ClassVar[str] = "ranked_routing"

    def plan(self, model: ModelSpec) -> Plan:
        layers = self.routed(model)
        return Plan(layers, Needs(llm=dict.fromkeys(layers, Rows.LAST_AHEAD)), "preserve", skips=layers)

    def score(self, view: StageView) -> Tensor:
        assert isinstance(view.stage, int)
        return view.llm_attention(view.stage, Rows.LAST_AHEAD)
