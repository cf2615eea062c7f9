"""FoPru: the patches, or the rows of patches, that the encoder's own attention lights up (arXiv:2411.14164)."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.method.base import ModelSpec, Needs, Plan, Rows, Scope, ScoringCompressor, StageView
from vtc.method.groups import Parts
from vtc.method.registry import register
from vtc.ops.rank import dense_rank, inverse, order_by
from vtc.ops.select import group_sizes, settle

Strategy = Literal["rank", "row"]
APART = 2**20
"""Rows of different crops lie so far apart: no crop is as high."""


@register
class FoPru(ScoringCompressor):
    """Keep the patches that all others attend to in the encoder, one by one or by rows of the picture.

    Acts before the LLM; training-free, text-agnostic. Significance of patch j: ``s_j = mean_h mean_i A_p[h, i, j]``
    over all queries i, the class token's included, p being the layer whose output is projected. strategy: "rank" keeps
    the highest; "row" ranks the rows of the raster by the mean of their patches and keeps the best ones as a whole.
    Ties go to the lower index, and what is kept is put back in raster order (arXiv:2411.14164, section 3).

    scope: "crop" keeps the same share of every crop, tile or frame, "item" ranks them, or their rows, together.

    Departures from the paper and its code: none is released. Budgets count tokens, so that the last row that "row"
    takes may fit in part only, and of that row the most significant patches stay; newline tokens stay and lie in no
    row; the layer is the one that `fastervlm` reads, the last that sees the whole image where others have windows.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("fopru", strategy="row").plan(llava).needs.vision
    {22: Received()}
    """

    strategy: Strategy = "rank"
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "fopru"

    def plan(self, model: ModelSpec) -> Plan:
        return dataclasses.replace(super().plan(model), needs=Needs(vision={model.key_layer: Rows.RECEIVED}))

    @torch.no_grad()
    def score(self, view: StageView) -> Tensor:
        significance = view.vision_attention(view.model.key_layer)
        if self.strategy == "rank":
            return significance
        parts = Parts.of(view, self.scope)
        row = view.crop.double() * APART + view.place[0].double()
        return parts.give(by_row(parts.take(significance.float()), parts.take(row), parts.mask))


def by_row(scores: Tensor, row: Tensor, mask: Tensor) -> Tensor:
    """Scores [I, N] by which the rows of highest mean come first as a whole, inside them the patches of highest score.

    row: [I, N] where the row of each patch lies; what differs by less than a hundredth is one row, and of equal rows
    the lower one is better. mask: [I, N] bool. Returns whole numbers, each once.

    >>> scores, row = torch.tensor([[0.1, 0.2, 0.3, 0.1]]), torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> by_row(scores, row, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[-3, -2, 0, -1]]
    """
    line = dense_rank(row, (~mask).long(), 0.01)
    sums = torch.zeros_like(scores).scatter_add(1, line, scores.masked_fill(~mask, 0))
    mean = (sums / group_sizes(line, scores.shape[1], mask).clamp(min=1)).gather(1, line)
    return -inverse(order_by(-settle(mean, mask), line, best=settle(scores, mask)))
