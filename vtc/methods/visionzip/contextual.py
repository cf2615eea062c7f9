"""VisionZip's two kinds of tokens: the ones attention picks, and evenly spaced ones that collect all others.

Works on crops side by side, [G, S] with S the longest of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.select import front_pack, take_rows, top_k

BLOCK = 1 << 24
"""Numbers held at a time."""


def dominant_and_targets(score: Tensor, dominant: Tensor, contextual: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mark the `dominant` highest scores of every crop, and `contextual` targets evenly spaced among the others.

    score, mask: [G, S]. dominant, contextual: [G] counts, together at most the crop's tokens. The R tokens that are not
    dominant are numbered in order; targets have the numbers 0, step, 2 step, ... with step = max(1, R // contextual).
    Ties go to the lower index. Returns two disjoint [G, S] bool.

    >>> dominant, target = dominant_and_targets(torch.arange(7.0)[None], torch.tensor([2]), torch.tensor([2]),
    ...                                         torch.ones(1, 7, dtype=torch.bool))
    >>> dominant.int().tolist(), target.int().tolist()
    ([[0, 0, 0, 0, 0, 1, 1]], [[1, 0, 1, 0, 0, 0, 0]])
    """
    best = top_k(score, dominant, mask)
    left = mask & ~best
    step = (left.sum(1) // contextual.clamp(min=1)).clamp(min=1)[:, None]
    number = left.cumsum(1) - 1
    return best, left & (number % step == 0) & (number // step < contextual[:, None])


def add_mean(tokens: Tensor, into: Tensor, target: Tensor, most: int | None = None) -> Tensor:
    """Every target plus the mean of the tokens that go into it: x + mean, a sum; [I, N, D], float32 inside.

    into: [I, N] places as from `nearest_target`; target: [I, N] bool. most: no item has more targets, where the host
    knows. A target that nothing goes into stays as it is, and so does every other token.
    """
    items, length, width = tokens.shape
    slots = min(length, most or length)
    number = target.cumsum(1) - 1  # the targets of an item, side by side
    given = (into >= 0) & ~target
    slot = torch.where(given, number.gather(1, into.clamp(min=0)), slots)
    count = torch.zeros(items, slots + 1, device=tokens.device).scatter_add(1, slot, given.float())
    first = torch.arange(items, device=tokens.device)[:, None] * (slots + 1)
    total = torch.zeros(items * (slots + 1), width, device=tokens.device)
    chunk = max(1, BLOCK // (items * width))
    for x, row in zip(torch.split(tokens, chunk, 1), torch.split(first + slot, chunk, 1), strict=True):
        total = total.index_add_(0, row.flatten(), x.flatten(0, 1).float())
    place = front_pack(target, slots)  # behind an item's targets other tokens, to which nothing is added
    mean = total.view(items, slots + 1, width)[:, :slots] / count[:, :slots, None].clamp(min=1)
    merged = (take_rows(tokens, place).float() + mean).to(tokens.dtype)
    return tokens.scatter(1, place[..., None].expand_as(merged), merged)
