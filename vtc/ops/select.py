"""Choosing and gathering rows, batched and without host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.ops.checks import numbers
from vtc.ops.host import put
from vtc.ops.rank import rank_in_group

TIE = 1e-6
"""Scores that differ by no more than this share of their magnitude are equal: rounding told them apart."""
TAIL = 64
"""So many entries below the last one kept are looked at for ties; more of them only where they are exactly equal."""


def settle(scores: Tensor, mask: Tensor | None = None, tie: float = TIE) -> Tensor:
    """Scores [I, N] in which those that only rounding tells apart are equal, so that ties do not depend on the batch.

    Products of another shape round differently, and the batch decides the shape. In sorted order, each entry takes the
    value of the one before it where the gap between them is at most `tie` of their magnitude. mask: [I, N] bool, what
    is outside plays no part and becomes -inf. Integers are exact and stay.

    >>> settle(torch.tensor([[2.0, 2.0 - 5e-7, 0.5, 1.0, 2.0]])).tolist()
    [[2.0, 2.0, 0.5, 1.0, 2.0]]
    """
    if not scores.is_floating_point() or not scores.shape[1]:
        return scores
    scores = numbers(scores, mask)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    place = torch.arange(ordered.shape[1], device=ordered.device)
    first = torch.where(_apart(ordered, tie), place, 0).cummax(1).values
    return torch.empty_like(ordered).scatter_(1, order, ordered.gather(1, first))


def first_best(scores: Tensor, slack: Tensor | float = TIE) -> Tensor:
    """Along the last axis, the lowest index of a score that is at most `slack` below the best; [..., N] -> [...].

    >>> first_best(torch.tensor([[0.5, 1.0, 1.0 + 1e-7]])).tolist()
    [1]
    """
    return (scores >= scores.amax(-1, keepdim=True) - slack).to(torch.uint8).argmax(-1)


@torch.no_grad()
def top_k(scores: Tensor, keep: Tensor, mask: Tensor | None = None, *, most: int | None = None) -> Tensor:
    """Mark the `keep` best entries of each row; ties (see `settle`) go to the lower index.

    scores: [I, N], higher is kept. keep: [I] counts, may differ by row. mask: [I, N] bool, False is never kept. most:
    no row keeps more, where the host knows; only so many are sorted. Returns bool [I, N] with min(keep, available)
    entries per row set.

    >>> top_k(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), torch.tensor([2])).tolist()
    [[False, True, True, False]]
    """
    length = scores.shape[1]
    if not length:
        return torch.zeros_like(scores, dtype=torch.bool)
    floating = scores.is_floating_point()
    # Comparisons with NaN are false; as the highest score it is kept, and the counts stay true. All that may be kept
    # becomes finite, and lies above what may not.
    scores = numbers(scores, mask).nan_to_num(torch.finfo(scores.dtype).max) if floating else scores.clone()
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf if floating else torch.iinfo(scores.dtype).min)
    held = length if most is None else min(length, most + TAIL)
    ordered = scores.topk(held, 1).values if held < length else scores.sort(1, descending=True).values
    # The best and the worst score of those that tie with the last one kept: nothing else depends on an index.
    last = (keep - 1).clamp(0, held - 1)[:, None]
    apart, place = _apart(ordered), torch.arange(held, device=scores.device)
    front = apart & (place <= last)
    best = (front * place).amax(1, keepdim=True)
    worst = held - 1 - ((apart ^ front) * (held - place)).amax(1, keepdim=True)
    bounds = ordered.gather(1, torch.cat([best, torch.minimum(worst, last + TAIL)], 1))
    # Ones and zeros in the place of scores: a CPU writes several of them at a time, and bools one by one.
    above = scores.clone().gt_(bounds[:, :1])
    tied = scores.ge_(bounds[:, 1:]).sub_(above)
    if mask is not None and not floating:  # a real score may be the lowest as well
        tied.mul_(mask)
    number = tied.cumsum(1, dtype=torch.promote_types(tied.dtype, torch.float32))
    kept = number.le_(keep[:, None] - best).mul_(tied).add_(above).bool()
    return kept if mask is None else kept & mask


def outliers(values: Tensor, mask: Tensor) -> Tensor:
    """Mark what lies above Q3 + 1.5 (Q3 - Q1) of each row's unmasked values, at least the largest; [R, N] bool.

    Quartiles are interpolated linearly.

    >>> outliers(torch.tensor([[1.0, 2.0, 3.0, 9.0, 1.5]]), torch.ones(1, 5, dtype=torch.bool)).int().tolist()
    [[0, 0, 0, 1, 0]]
    """
    ordered = values.float().masked_fill(~mask, torch.inf).sort(1).values
    count = mask.sum(1, keepdim=True)
    at = put([0.25, 0.75], values.device) * (count - 1).clamp(min=0)
    low, high = (ordered.gather(1, each.long()) for each in (at.floor(), at.ceil()))
    first, third = (low + (at - at.floor()) * torch.where(high > low, high - low, 0)).chunk(2, 1)
    many = (mask & (values > third + 1.5 * (third - first))).sum(1)
    return top_k(values, many.clamp(min=1), mask)


def evenly(mask: Tensor, count: Tensor) -> Tensor:
    """Mark `count` [I] of the unmasked entries of each row [I, N], spread evenly, half a step from the ends.

    Of R entries, numbered in order, number m is marked where ``round(m count / R)`` is about to rise.

    >>> evenly(torch.tensor([[True, True, False, True, True, True, True]]), torch.tensor([2])).int().tolist()
    [[0, 1, 0, 0, 0, 1, 0]]
    """
    behind = mask.cumsum(1)
    total = mask.sum(1, keepdim=True).clamp(min=1)
    rise = (2 * (behind - 1) * count[:, None] + total) // (2 * total)
    return mask & ((2 * behind * count[:, None] + total) // (2 * total) > rise)


def _apart(ordered: Tensor, tie: float = TIE) -> Tensor:
    """Whether an entry of falling rows [I, N] is lower than the one before it by more than rounding; bool [I, N]."""
    apart = torch.ones_like(ordered, dtype=torch.bool)
    higher, lower = ordered[:, :-1], ordered[:, 1:]
    if ordered.is_floating_point():
        slack = tie * torch.maximum(higher, -lower).nan_to_num(0.0, 0.0, 0.0)
        apart[:, 1:] = ~(higher - lower <= slack)
    else:
        apart[:, 1:] = higher != lower
    return apart


def apportion(total: Tensor, sizes: Tensor) -> Tensor:
    """Split `total` [I] over groups in proportion to their `sizes` [I, G], exactly, by largest remainder.

    Every share is the exact one rounded up or down, never above the group's size while total <= the sum of sizes;
    equal remainders go to the lower group. Returns [I, G].

    >>> apportion(torch.tensor([7]), torch.tensor([[16, 8, 4]])).tolist()
    [[4, 2, 1]]
    """
    whole = sizes.sum(1, keepdim=True).clamp(min=1)
    exact = sizes * total[:, None]
    share = exact // whole
    return share + top_k(exact - share * whole, total - share.sum(1))


def apportion_host(total: int, sizes: Sequence[int]) -> list[int]:
    """Split `total` over groups in proportion to their `sizes`, exactly, by largest remainder; on the host.

    The shares that `apportion` gives on the device: equal remainders go to the lower group.

    >>> apportion_host(7, [16, 8, 4]), apportion_host(2, [1, 1, 1])
    ([4, 2, 1], [1, 1, 0])
    """
    whole = max(1, sum(sizes))
    return rounded([size * total // whole for size in sizes], [size * total % whole for size in sizes], total)


def rounded(shares: Sequence[int], left: Sequence[float], total: int) -> list[int]:
    """Shares that were rounded down, those with the most `left` rounded up instead, until they are `total` together.

    Of equal remainders the lower group's counts first.

    >>> rounded([3, 1, 1], [0.2, 0.4, 0.4], 6)
    [3, 2, 1]
    """
    found = list(shares)
    for group in sorted(range(len(found)), key=lambda group: -left[group])[: total - sum(found)]:
        found[group] += 1
    return found


def group_sizes(group: Tensor, groups: int, mask: Tensor) -> Tensor:
    """[I, groups] entries of each group; group: [I, N] numbers below `groups`, read where mask [I, N] is set."""
    counts = torch.zeros(len(group), groups + 1, dtype=torch.long, device=group.device)
    return counts.scatter_add(1, torch.where(mask, group, groups), mask.long())[:, :groups]


def in_groups(group: Tensor, groups: int, width: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lay the tokens of each group side by side: places [I, groups, width] in the item, and which of them are real.

    group: [I, N] numbers below `groups`, read where mask [I, N] is set. width: no group has more tokens than this.
    """
    real = torch.arange(width, device=group.device) < group_sizes(group, groups, mask)[..., None]
    group = torch.where(mask, group, groups)
    slot = torch.where(mask, group * width + rank_in_group(group), groups * width)
    token = torch.arange(group.shape[1], device=group.device).expand_as(group)
    place = token.new_zeros(len(group), groups * width + 1).scatter(1, slot, token)[:, :-1].contiguous()
    return place.view(len(group), groups, width), real


def out_of_groups(values: Tensor, place: Tensor, real: Tensor, length: int, empty: float = 0) -> Tensor:
    """Undo `in_groups`: values, place, real [I, G, W] -> [I, length], `empty` where a token lies in no group.

    >>> place, real = in_groups(torch.tensor([[1, 0, 1]]), 2, 2, torch.ones(1, 3, dtype=torch.bool))
    >>> out_of_groups(torch.tensor([[[5, 0], [6, 7]]]), place, real, 3).tolist()
    [[6, 5, 7]]
    """
    spare = torch.where(real, place, length).flatten(1)
    full = values.new_full((len(values), length + 1), empty)
    return full.scatter(1, spare, values.flatten(1))[:, :length]


def left_pack(kept: Tensor, length: int) -> Tensor:
    """Indices that move the kept rows, in order, to the right end of `length` slots.

    kept: [B, S] bool with at most `length` True per row. Returns [B, length]; the slots in front of a row's kept
    entries point at dropped ones and must be masked by the caller.

    >>> left_pack(torch.tensor([[True, False, True], [False, True, False]]), 2).tolist()
    [[0, 2], [2, 1]]
    """
    order = kept.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, kept.shape[1] - length :]


def front_pack(kept: Tensor, length: int) -> Tensor:
    """Indices of each row's kept entries in order, at the left end of `length` slots; [I, N] bool -> [I, length]."""
    return (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: x [B, S, ...], index [B, L] -> [B, L, ...]."""
    if x.ndim == 2:
        return x.gather(1, index)
    if x.device.type != "cpu" or not x.is_contiguous():
        return x[torch.arange(x.shape[0], device=x.device)[:, None], index]
    # A CPU copies whole rows of one long list twice as fast.
    first = torch.arange(x.shape[0])[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, *x.shape[2:])


def take_last(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the last axis: x [..., B, S], index [B, L] -> [..., B, L]."""
    return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))


def put_rows(background: Tensor, index: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """The way back of `take_rows`: `background` [B, S, ...] with `rows` [B, L, ...] at the places `index` [B, L].

    where: [B, L] bool, which of the rows are written; no two of those of a batch row share a place.

    >>> put_rows(torch.zeros(1, 3), torch.tensor([[0, 2]]), torch.tensor([[False, True]]), torch.ones(1, 2))
    tensor([[0., 0., 1.]])
    """
    length = background.shape[1]
    full = torch.cat([background, background.new_zeros(background.shape[0], 1, *background.shape[2:])], dim=1)
    row = torch.arange(background.shape[0], device=background.device)[:, None]
    return full.index_put_((row, torch.where(where, index, length)), rows)[:, :length]
