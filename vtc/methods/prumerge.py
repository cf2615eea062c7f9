"""PruMerge and PruMerge+: tokens the class token looks at, each with its neighbours added (arXiv:2403.15388)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Order, Plan, Rows, Selection, StageView
from vtc.method.groups import Groups, Parts
from vtc.method.parts import reordered
from vtc.method.readings import AttentionCall, VisionReading
from vtc.method.registry import register
from vtc.ops.attention import attention_rows
from vtc.ops.rank import order_by
from vtc.ops.select import evenly, front_pack, outliers, take_rows, top_k

Count = Literal["budget", "outliers"]
BLOCK = 1 << 24
"""Similarities held at a time."""


@dataclass(frozen=True)
class ClassRowOneHead(VisionReading):
    """Softmax attention of the class token to every key as if all heads were one, scaled by its width."""

    name: ClassVar[str] = "cls, one head"
    needs_cls: ClassVar[bool] = True

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length * width

    def read(self, attention: AttentionCall) -> Tensor:
        query, key = (each.transpose(1, 2).flatten(2)[:, None] for each in (attention.query, attention.key))
        first = torch.zeros(len(query), 1, dtype=torch.long, device=query.device)
        return attention_rows(query, key, first, query.shape[-1] ** -0.5, mask=attention.mask)[:, 0]


ONE_HEAD = ClassRowOneHead()


@register
class PruMerge(Compressor):
    """Keep the patches that the class token attends to most, and add to each what resembles it.

    Acts before the LLM; training-free, text-agnostic. With q and k of the encoder's last layer, all heads as one of
    width C, ``a = softmax(q_cls k / sqrt(C))`` over all keys. Of k tokens, k - 1 are kept: round(share * (k - 1)) with
    the largest a, the others spread evenly over the rest, in raster order. Kept token i becomes ``x_i + sum a_n x_n``
    over the `neighbours` other tokens, kept or not, of highest cosine of their keys. The last token is ``sum a_j x_j``
    over all that were not kept. Crops, tiles and frames are treated one by one and share k in proportion to their
    sizes; one that keeps all its tokens stays as it is. Ties go to the lower index.

    share: part that attention chooses; 1.0 is PruMerge, and `prumerge_plus` has 0.25. neighbours: 32 in the paper.
    count: "outliers" takes no budget but the paper's own count, which depends on the image: the tokens with
    ``a > Q3 + 1.5 (Q3 - Q1)``, at least one; where share is below 1 every s-th of the N tokens besides, s a third of
    N / outliers, rounded down, at least 1; and the last token. layout: "raster" leaves tokens at their places and the
    last one at that of the last token that was not kept; "official" lists them by falling a, then the evenly spread
    ones, then the last one.

    Departures from the paper and its code: features behind the projector instead of in front of it; an exact budget,
    where the code has the adaptive count and others derive fixed forms from it; the outliers of each crop are its own;
    encoders without a class token use the attention a patch receives, mean over heads and queries, in the last layer
    that sees the whole image; newline tokens stay; the tuned variant is left out.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("prumerge").plan(llava).needs.vision
    {23: (ClassRowOneHead(), Keys())}
    >>> vtc.create("prumerge_plus", count="outliers").needs_budget
    False
    """

    share: float = 1.0
    neighbours: int = 32
    count: Count = "budget"
    layout: Order = "raster"

    name = "prumerge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise VTCError(
                f"share={self.share!r} is no part of the tokens; pass 1.0 for PruMerge, 0.25 for PruMerge+, or between"
            )
        if self.neighbours < 0:
            raise VTCError(f"neighbours={self.neighbours!r} is no number of tokens; the paper uses 32, 0 adds none")

    @property
    def needs_budget(self) -> bool:
        return self.count == "budget"

    @staticmethod
    def reading(model: ModelSpec) -> tuple[int, VisionReading]:
        """The encoder layer, and what of it says how much each token counts."""
        return (
            (model.vision_layers - 1, ONE_HEAD) if model.has_cls else (model.full_attention_layers[-1], Rows.RECEIVED)
        )

    def plan(self, model: ModelSpec) -> Plan:
        layer, attention = self.reading(model)
        return dataclasses.replace(super().plan(model), needs=Needs(vision={layer: (attention, Rows.KEYS)}))

    def parts(self, view: StageView) -> tuple[Parts, Tensor, int]:
        """Crops, [R] tokens that each may keep, and what none exceeds."""
        if self.needs_budget:
            groups = Groups.of(view, "crop")
            return groups.parts, groups.keep, groups.steps
        parts = Parts.of(view, "crop")
        return parts, parts.mask.sum(1), parts.mask.shape[1]

    def select(self, view: StageView) -> Selection:
        layer, attention = self.reading(view.model)
        score = view.vision_attention(layer, attention).detach()
        parts, keep, most = self.parts(view)
        mask, size = parts.mask, parts.mask.sum(1)
        weight = torch.where(mask, parts.take(score), 0)
        if self.needs_budget:
            left = (keep - 1).clamp(min=0)
            best = top_k(weight, (left * self.share + 0.5).floor().long(), mask)
            kept = best | evenly(mask & ~best, left - best.sum(1))
        else:
            best = outliers(weight, mask)
            kept = best | grid(best, mask) if self.share < 1 else best
        dropped = mask & ~kept
        last = (dropped * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        extra = torch.zeros_like(mask).scatter(1, last[:, None], True) & dropped & (keep > 0)[:, None]
        x, keys = parts.take(view.tokens), parts.take(view.vision_attention(layer, Rows.KEYS).detach())
        rows = add_neighbours(x, weight, keys, kept, mask, self.neighbours, most)
        rest = torch.bmm((weight * dropped)[:, None], x.float()).to(x.dtype)
        rows = torch.where(extra[..., None], rest, rows)
        rows = torch.where((keep >= size)[:, None, None], x, rows) if self.needs_budget else rows
        number = parts.take(torch.arange(score.shape[1], device=mask.device).expand_as(score).contiguous())
        into = torch.where(kept | ~extra.any(1, keepdim=True), number, number.gather(1, last[:, None]))
        stays, tokens = parts.give(kept | extra), parts.give(rows)
        into = torch.where(view.items.mask & parts.give(mask & (keep > 0)[:, None]), parts.give(into), -1)
        counts = view.keep if self.needs_budget else None
        if self.layout == "official":
            kind = parts.give(torch.where(best, 0, 1) + extra)
            order = order_by(~stays, view.crop, kind, best=score * parts.give(best))
            tokens, into = reordered(stays, tokens, into, order, max(counts, default=0) if counts else None)
        return Selection(stays, counts=counts, tokens=tokens, merged_into=into, scores=score)


@register
class PruMergePlus(PruMerge):
    """PruMerge with three quarters of its tokens spread evenly over the picture; all else is as in `prumerge`.

    Departures from the paper and its code: those of `prumerge`.

    >>> import vtc
    >>> vtc.create("prumerge_plus").share
    0.25
    """

    share: float = 0.25

    name = "prumerge_plus"


def grid(best: Tensor, mask: Tensor) -> Tensor:
    """Every s-th place but the last one, s a third of the tokens there are for each of the best; [R, N] bool."""
    size, place = mask.sum(1, keepdim=True), torch.arange(mask.shape[1], device=mask.device)
    step = (size // best.sum(1, keepdim=True).clamp(min=1) // 3).clamp(min=1)
    return mask & (place % step == 0) & (place < size - 1)


def add_neighbours(
    x: Tensor, weight: Tensor, keys: Tensor, kept: Tensor, mask: Tensor, neighbours: int, most: int
) -> Tensor:
    """Every kept token plus the weighted sum of the `neighbours` others whose keys are most like its own; [R, W, D].

    x: [R, W, D]. weight, kept, mask: [R, W]. keys: [R, W, C]. most: no row keeps more. Streams over the kept tokens:
    BLOCK similarities are held at a time.
    """
    parts, length, _ = x.shape
    place = front_pack(kept, most)
    unit, rows = torch.nn.functional.normalize(keys.float(), dim=2), x.float()
    spots = torch.arange(length, device=x.device)
    sums = []
    for some in torch.split(place, max(1, BLOCK // max(1, parts * length)), 1):
        cosine = torch.bmm(take_rows(unit, some), unit.transpose(1, 2)).flatten(0, 1)
        others = mask.repeat_interleave(some.shape[1], 0) & (spots != some.flatten()[:, None])
        wanted = torch.full((len(cosine),), neighbours, device=x.device)
        near = top_k(cosine, wanted, others, most=neighbours).view(parts, -1, length)
        sums.append(torch.bmm(near * weight[:, None], rows))
    merged = (take_rows(rows, place) + torch.cat(sums, 1)).to(x.dtype)
    merged = x.scatter(1, place[..., None].expand_as(merged), merged)
    return torch.where(kept[..., None], merged, x)
