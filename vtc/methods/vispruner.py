"""VisPruner: what the class token attends to, and of the rest what is no duplicate (arXiv:2412.01818, version 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Scope, Selection, StageView
from vtc.method.parts import groups
from vtc.method.registry import register
from vtc.ops.host import put
from vtc.ops.merge import group_places
from vtc.ops.nearest import streamed
from vtc.ops.rank import order_by
from vtc.ops.select import apportion_host, front_pack, settle, take_rows, top_k

ROUND = 8
"""Duplicates that leave at once."""
BLOCK = 2**25
"""Similarities held at a time."""


@register
class VisPruner(Compressor):
    """Keep the patches the class token attends to, and of all others those that duplicate each other least.

    Acts before the LLM; training-free, text-agnostic (version 2 of arXiv:2412.01818). Of k tokens, int(k * share) are
    important: those with the highest ``s_j = mean_h A_p[h, CLS, j]``, p being the layer whose output is projected. The
    others form a list by falling s. While it is too long, every second entry, from the first one on, is compared with
    all entries between them, by the cosine of the features that layer p puts out; the (up to) 8 whose highest cosine is
    highest leave; the next list is the other compared ones by falling cosine, then all that they were compared with.
    Ties go to the lower index, kept tokens stay in raster order.

    share: the important part; 0.5 in most of the paper's experiments, 0.75 for 64 tokens on MME; 1 is `fastervlm`.
    scope: "crop" works in every crop, tile or frame, "item" on all of them together.

    Departures from the paper and its code: a round removes at most half of the list; where its length is odd, the last
    entry is compared too (the code fails there). Encoders without a class token use the attention a patch receives,
    mean over heads and queries, in the last layer up to the features that sees the whole image. Newline tokens stay;
    crops keep the same share, not the same count; margins of tiled images never enter the prompt and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("vispruner", share=0.75).plan(llava).needs.vision
    {22: (ClassRow(), LayerOutput())}
    """

    share: float = 0.5
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "vispruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise VTCError(f"share={self.share!r} is no part of the tokens; the paper uses 0.5 and 0.75")

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs({model.key_layer: (model.patch_attention, Rows.HIDDEN)})
        return dataclasses.replace(super().plan(model), needs=needs)

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        items, layer = view.items, view.model.key_layer
        crop, sizes = groups(view, self.scope)
        shares = [k for row, keep in zip(sizes, view.keep, strict=True) for k in _split(keep, row)]
        counts = [n for row in sizes for n in row if n]
        important = [int(k * self.share) for k in shares]
        rest = [n - first if k else 0 for n, k, first in zip(counts, shares, important, strict=True)]
        left = [k - first for k, first in zip(shares, important, strict=True)]
        places = group_places(crop, items.mask, sizes)
        score = view.vision_attention(layer, view.model.patch_attention)
        features = view.vision_attention(layer, Rows.HIDDEN)
        scores = score.flatten()[places].float()
        count, first = put([counts, important], score.device)
        real = torch.arange(places.shape[1], device=score.device) < count[:, None]
        kept = top_k(scores, first, real)
        if self.share < 1:
            falling = order_by(best=settle(scores, real & ~kept))
            rows = features.flatten(0, 1)[places].masked_fill_(~real[..., None], 0)
            order = diverse(rows, falling, rest, left)
            listed = torch.arange(order.shape[1], device=order.device) < put(left, order.device)[:, None]
            kept = kept.scatter_add(1, order, listed)
        marks = torch.zeros(items.mask.numel(), dtype=torch.long, device=score.device)
        marks = marks.index_add(0, places.flatten(), kept.long().flatten())
        return Selection(marks.view(items.mask.shape) > 0, counts=view.keep, scores=score)


def diverse(features: Tensor, order: Tensor, counts: Sequence[int], left: Sequence[int], size: int = ROUND) -> Tensor:
    """Thin a list of tokens to `left`, those most like another one leaving first, `size` in a round (see `VisPruner`).

    features: [G, t, C]. order: [G, t] places, of which the first `counts` of each group are its list. Returns [G, K]
    places, of which the first `left` are what remains.
    """
    now = list(counts)
    order = order[:, : max(now, default=0)]
    unit = torch.nn.functional.normalize(features.float(), dim=2)
    while now != list(left):
        gone = [min(size, n - wanted, n // 2) for n, wanted in zip(now, left, strict=True)]
        count, leave = put([now, gone], order.device)[..., None]
        now = [n - r for n, r in zip(now, gone, strict=True)]
        first, second = order[:, ::2], order[:, 1::2]
        place = torch.arange(first.shape[1], device=order.device)
        compared, others = 2 * place < count, 2 * place[: second.shape[1]] + 1 < count
        alike = streamed(
            take_rows(unit, first), take_rows(unit, second), others, lambda _, products: products.amax(2), BLOCK
        )
        falling = order_by(best=settle(alike, compared))
        stays = torch.cat([(place >= leave) & compared, others], 1)
        order = torch.cat([first.gather(1, falling), second], 1).gather(1, front_pack(stays, max(now)))
    return order


def _split(keep: int, sizes: Sequence[int]) -> list[int]:
    """What each crop that has tokens keeps."""
    return [share for share, size in zip(apportion_host(keep, sizes), sizes, strict=True) if size]
