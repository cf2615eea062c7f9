"""HoloV: every run of the picture gets a share by attention and variation, and keeps its most attended (2510.02912)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.registry import register
from vtc.ops.blocks import lengths
from vtc.ops.host import put
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import in_groups, out_of_groups, settle, top_k

ATTENTION, VARIATION = 1000.0, 0.09
"""Weights of what a token receives and of how unevenly it resembles its neighbours."""
BLOCKS = 2**20, 2**25
"""Similarities, or numbers of tokens, held at a time, on a CPU and elsewhere."""


@register
class HoloV(Compressor):
    """Share the budget over strips of the picture, so that no crowd of attended patches takes it all.

    Acts before the LLM; training-free, text-agnostic. The n tokens of an item, in raster order, crops one behind the
    other, are cut into P runs of n // P tokens, the first n mod P of one more. In a run of s projected tokens, with
    cosines S_ij (S_ii = 0): ``m_i = sum_j S_ij / (s - 1)``, ``v_i = sum_j (S_ij - m_i)^2 / (s - 1)`` and, with a_i a
    thousand times the class token's attention, ``w = mean_i (a_i + 0.09 v_i mean(a) / (mean(v) + 1e-6))``. Run p gets
    floor(k w_p / sum w) of k tokens, and those of largest w one more each until there are k. It keeps its tokens of
    largest attention. Ties go to the lower index, kept tokens stay in raster order.

    runs: P, 16 as released for LLaVA. None is ``max(1, int(1024 n / (576 k)))``, as released for Qwen2.5-VL.

    Departures from the paper and its code: what a run cannot hold of its share goes to the others, the one of largest w
    first, where the code pads with rows of zeros; kept tokens stay in raster order, not by falling attention. As in the
    code, what the paper calls crops are runs of raster rows, not windows. Encoders without a class token use the
    attention a patch receives, mean over heads and queries, in the last layer that sees the whole image. Newline tokens
    stay and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("holov").plan(llava).needs.vision
    {22: ClassRow()}
    """

    runs: int | None = 16

    name: ClassVar[str] = "holov"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runs is not None and self.runs < 1:
            raise VTCError(f"runs={self.runs!r} cuts nothing; pass at least 1, the code uses 16, or None")

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(vision={model.key_layer: model.patch_attention})
        return dataclasses.replace(super().plan(model), needs=needs)

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        items, device = view.items, view.device
        number = [
            self.runs or max(1, int(1024 * n / (576 * max(1, k)))) for n, k in zip(items.counts, view.keep, strict=True)
        ]
        run, width = runs_of(items.counts, number, items.mask)
        place, real = in_groups(run, max(number, default=1), width, items.mask)
        attention = view.vision_attention(view.model.key_layer).float()
        received = torch.where(real, attention.gather(1, place.flatten(1)).view(place.shape), 0)
        varied = variation(view.tokens, place, real)
        size = real.sum(2)
        keep = put(view.keep, device)
        quota = share(weight(received, varied, size), keep, size)
        best = top_k(received.flatten(0, 1), quota.flatten(), real.flatten(0, 1)).view(place.shape)
        kept = out_of_groups(best, place, real, items.mask.shape[1])
        return Selection(kept, counts=view.keep, scores=attention)


def runs_of(counts: Sequence[int], number: Sequence[int], mask: Tensor) -> tuple[Tensor, int]:
    """[I, N] run of each token, items of `counts` tokens being cut into `number` runs, and the longest run's length.

    >>> runs_of([7], [3], torch.ones(1, 7, dtype=torch.bool))
    (tensor([[0, 0, 0, 1, 1, 2, 2]]), 3)
    """
    cut = [(n // p, n % p) for n, p in zip(counts, number, strict=True)]
    size, longer = put(cut, mask.device).view(-1, 2, 1).unbind(1)
    token = torch.arange(mask.shape[1], device=mask.device)
    ahead = longer * (size + 1)  # tokens of the longer runs
    run = torch.where(token < ahead, token // (size + 1), longer + (token - ahead) // size.clamp(min=1))
    return torch.where(mask, run, 0), max((each + (rest > 0) for each, rest in cut), default=0)


def variation(tokens: Tensor, place: Tensor, real: Tensor) -> Tensor:
    """How unevenly each token resembles the others of its run, 0 where none is; [I, N, D], [I, P, W] each -> [I, P, W].

    Streams over runs and tokens.
    """
    items, length, depth = tokens.shape
    spot = (place + length * torch.arange(items, device=place.device)[:, None, None]).flatten(0, 1)
    flat, inside, width = tokens.reshape(-1, depth), real.flatten(0, 1), place.shape[2]
    scale = inside / lengths(tokens).clamp(min=1e-12).flatten()[spot]
    found, held = torch.zeros_like(scale), BLOCKS[tokens.device.type != "cpu"]
    several, size = max(1, held // max(1, width * max(width, depth))), max(1, min(width, held // max(1, width)))
    for first in range(0, len(spot), several):
        run = slice(first, first + several)
        rows, others = flat[spot[run]].float(), (inside[run].sum(1, keepdim=True) - 1).clamp(min=1)
        for at in range(0, width, size):
            some = slice(at, at + size)
            like = torch.bmm(rows[:, some], rows.transpose(1, 2)).mul_(scale[run, some, None]).mul_(scale[run, None])
            like.diagonal(at, 1, 2).zero_()
            like.sub_((like.sum(2) / others)[..., None]).mul_(inside[run, None])
            found[run, some] = like.square_().sum(2) / others
    return torch.where(real, found.view(real.shape), 0)


def weight(received: Tensor, varied: Tensor, size: Tensor) -> Tensor:
    """What a run counts for: [I, P, W] of its tokens, 0 where none is, and [I, P] sizes -> [I, P]."""
    mean_a, mean_v = (each.sum(2) / size.clamp(min=1) for each in (ATTENTION * received, varied))
    return mean_a + VARIATION * mean_v * mean_a / (mean_v + 1e-6)


def share(weight: Tensor, keep: Tensor, size: Tensor) -> Tensor:
    """Split `keep` [I] over runs by their weights [I, P], none more than its size [I, P]; returns [I, P].

    >>> share(torch.tensor([[6.0, 1.0, 2.0]]), torch.tensor([9]), torch.tensor([[4, 4, 4]])).tolist()
    [[4, 1, 4]]
    """
    weight = settle(weight, size > 0).clamp(min=0)
    exact = keep[:, None] * weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    quota = exact.floor().long()
    quota = quota + top_k(weight, keep - quota.sum(1), size > 0)
    held = quota.minimum(size)
    order = order_by(best=weight)
    room = (size - held).gather(1, order)
    spare = (keep - held.sum(1))[:, None] - (room.cumsum(1) - room)
    return held + spare.clamp(min=0).minimum(room).gather(1, inverse(order))
