"""VisionZip's two kinds of tokens: the ones attention picks, and evenly spaced ones that collect all others.

Works on crops side by side, [G, S] with S the longest of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.merge import merge_rows
from vtc.ops.select import front_pack, group_sizes, take_rows, top_k


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


def add_mean(tokens: Tensor, into: Tensor, kept: Tensor, most: int | None = None) -> Tensor:
    """The kept tokens of every item in order, each plus the mean of the tokens that go into it; [I, K, D].

    A sum, x + mean, float32 inside. tokens: [I, N, D]. into: [I, N] places as from `nearest_target`. kept: [I, N] bool.
    most: K, no item keeps more, where the host knows; else N. Behind an item's kept tokens the others follow.
    """
    slots = min(tokens.shape[1], most or tokens.shape[1])
    number = kept.cumsum(1) - 1
    given = (into >= 0) & ~kept
    slot = torch.where(given, number.gather(1, into.clamp(min=0)), slots)
    count = group_sizes(slot, slots + 1, given)
    mean = merge_rows(tokens, slot, 1 / count.gather(1, slot).clamp(min=1), slots, dtype=torch.float32)
    return mean.add_(take_rows(tokens, front_pack(kept, slots))).to(tokens.dtype)
