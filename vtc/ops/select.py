"""Choosing and gathering rows, batched and without host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, keep: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mark the `keep` best entries of each row; ties go to the lower index.

    scores: [I, N], higher is kept. keep: [I] counts, may differ by row. mask: [I, N] bool, False is never kept.
    Returns bool [I, N] with min(keep, available) entries per row set.

    >>> top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([2])).tolist()
    [[False, True, True, False]]
    """
    if mask is not None:
        # Two stable sorts instead of a -inf fill: a real score may be -inf as well.
        by_score = scores.argsort(dim=1, descending=True, stable=True)
        order = by_score.gather(1, (~mask).gather(1, by_score).to(torch.uint8).argsort(dim=1, stable=True))
    else:
        order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    chosen = rank < keep[:, None]
    return chosen if mask is None else chosen & mask


def left_pack(keep: Tensor, length: int) -> Tensor:
    """Indices that move the kept rows, in order, to the right end of `length` slots.

    keep: [B, S] bool with at most `length` True per row. Returns [B, length]; the slots in front of a row's kept
    entries point at dropped ones and must be masked by the caller.

    >>> left_pack(torch.tensor([[True, False, True], [False, True, False]]), 2).tolist()
    [[0, 2], [2, 1]]
    """
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, keep.shape[1] - length :]


def front_pack(keep: Tensor, length: int) -> Tensor:
    """Indices of each row's kept entries in order, at the left end of `length` slots; [I, N] bool -> [I, length]."""
    return (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: x [B, S, ...], index [B, L] -> [B, L, ...]."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def take_last(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the last axis: x [..., B, S], index [B, L] -> [..., B, L]."""
    return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))
