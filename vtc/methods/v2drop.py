"""V2Drop: tokens that a layer of the LLM hardly changes are dropped (arXiv:2509.01552)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vtc.method.base import ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.items import ItemTable
from vtc.method.registry import register
from vtc.method.schedule import DEPTH, scaled
from vtc.method.staged import StagedCompressor
from vtc.ops.blocks import distances
from vtc.ops.host import put
from vtc.ops.select import top_k


@register
class V2Drop(StagedCompressor):
    """Drop, at several depths of the LLM, the visual tokens that the layer before changed least.

    Acts inside the LLM; training-free, follows no question, reads no attention. Before layer l of the list token j has
    the score ``|h_l,j - h_l-1,j|``, the Euclidean length of what layer l - 1 added to it, h_l being the input of layer
    l; the tokens of highest score stay, with their positions (arXiv:2509.01552, section 4). Ties go to the lower index.

    layers: the list, of an LLM of 32 layers, scaled to the depth of others. ratios: the shares of the tokens given to
    the LLM that stages leave, at least one token; then no retention or keep is given. Published: 0.5, 0.25 and one
    token. By default lambda, lambda^2, lambda^3 of the tokens stay, with the lambda that meets the budget as the mean
    over all layers. schedule: instead of both, such as "sigmoid(8)", "cosine" or a rate for every layer.

    Departures from the paper and its code: the budget is solved for; every image has its own share, where the release
    knows one image a prompt; newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("v2drop").plan(llava).stages
    (2, 3, 16, 17, 21, 22)
    """

    layers: tuple[int, ...] = (3, 17, 22)

    name: ClassVar[str] = "v2drop"
    published, published_ratios = (3, 17, 22), (0.5, 0.25, 0.0)
    last, rounds = DEPTH - 1, 0.0

    def lists(self, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
        return (scaled(self.layers, model.llm_layers, first=1),)

    def plan(self, model: ModelSpec) -> Plan:
        stages = sorted({stage for start in self.starts(model) for stage in (start - 1, start)})
        return Plan(tuple(stages), Needs(), "preserve")

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        starts, items, tokens = self.starts(view.model), view.items, view.tokens
        selection = None
        if view.stage in starts:
            counts = self.left(view, view.stage)
            if counts != items.counts:
                change = _change(view, *view.memory[self])
                marks = top_k(change, put(counts, tokens.device), items.gaps, most=max(counts))
                selection = Selection(marks, counts=counts, scores=change)
        if view.stage + 1 in starts:
            view.memory[self] = items, tokens
        return selection


def _change(view: StageView, before: ItemTable, then: Tensor) -> Tensor:
    """[I, N] how far the tokens are from their rows `then` [I, M, D] where the table was `before`."""
    items, place = view.items, None
    if items.counts != before.counts:  # some have left since, and those that stay kept their order
        numbers = torch.where(before.mask, before.token, max(layout.n_tokens for layout in items.layouts))
        place = torch.searchsorted(numbers, items.token)
    return distances(view.tokens, then, place)
