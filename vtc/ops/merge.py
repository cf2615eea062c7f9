"""Bipartite token merging: every other token proposes its most similar partner among the rest, the best pairs merge.

Groups (images, crops, frames) of different size lie side by side and each merges as many tokens as it has to. What a
merge decides is one integer per token, the row it ends in, and one weight; `merge_rows` applies the decision to
features, keys or anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vtc.ops.blocks import blocks, lengths
from vtc.ops.checks import numbers
from vtc.ops.host import put
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import TIE, first_best, settle, take_rows

RowOrder = Literal["similarity", "index"]
Step = Callable[[Tensor, Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]
"""One step of a merge, as `merge_step` takes and gives it."""
BLOCK = 2**25
"""Numbers of a similarity block held at once (128 MiB in float32)."""


class Merge(NamedTuple):
    """The outcome of merging G groups of up to t tokens to up to K rows.

    target: [G, t] row each token ends in; K behind a group's end. weight: [G, t] share of the token in that row, the
    shares of a row sum to one. anchor: [G, K] token that a row stands for (an unmerged token is its own, merged tokens
    follow the last target); 0 behind a group's end. size: [G, K] summed sizes. counts: rows per group.
    """

    target: Tensor
    weight: Tensor
    anchor: Tensor
    size: Tensor
    counts: tuple[int, ...]


def merge_plan(count: int, keep: int) -> list[int]:
    """Tokens to merge away at each step so that `keep` of `count` are left: half of them while that is too few.

    >>> merge_plan(196, 49), merge_plan(576, 252), merge_plan(576, 72), merge_plan(9, 9)
    ([98, 49], [288, 36], [288, 144, 72], [])
    """
    steps: list[int] = []
    while count > max(keep, 1):
        steps.append(min(count // 2, count - keep))
        count -= steps[-1]
    return steps


def best_match(metric: Tensor, counts: Tensor, *, protected: int = 0) -> tuple[Tensor, Tensor]:
    """For every even token the odd token of its group with the highest cosine similarity.

    metric: [G, t, C]; counts: [G] tokens of each group. protected: tokens at the front that propose nobody. Returns
    (partner, similarity), both [G, ceil(t / 2)]: entry i belongs to token 2 * i and names token 2 * partner + 1; the
    similarity is -inf where there is no such pair. Ties go to the lower partner. Streams over the even tokens.
    """
    groups, length, _ = metric.shape
    sources, targets = metric[:, ::2], metric[:, 1::2]
    places = torch.arange(sources.shape[1], device=metric.device)
    if length < 2:
        return places.expand(groups, -1), metric.new_full((groups, len(places)), -torch.inf, dtype=torch.float32)
    present = 2 * places[: targets.shape[1]] + 1 < counts[:, None]
    scale = 1 / lengths(metric).clamp(min=1e-12)
    partner, similarity = [], []
    for part in torch.split(sources, max(1, BLOCK // max(1, groups * targets.shape[1])), dim=1):
        like = torch.bmm(part.float(), targets.float().transpose(1, 2)).mul_(scale[:, None, 1::2])
        like.masked_fill_(~present[:, None], -torch.inf)
        slack = TIE * torch.linalg.vector_norm(part, dim=2, keepdim=True, dtype=torch.float32)
        partner.append(first_best(like, slack))
        similarity.append(like.amax(-1))
    proposes = (2 * places < counts[:, None]) & (2 * places >= protected)
    rated = torch.cat(similarity, 1) * scale[:, ::2]
    return torch.cat(partner, 1), numbers(rated, proposes).masked_fill(~proposes, -torch.inf)


def merge_step(
    metric: Tensor, counts: Sequence[int], merged: Sequence[int], *, order: RowOrder = "similarity", protected: int = 0
) -> tuple[Tensor, Tensor]:
    """One step: the `merged` most similar pairs of each group become one row each.

    metric: [G, t, C]; counts, merged: tokens of each group and how many disappear, at most half of them. order:
    unmerged even tokens come first, the most similar first or by index, then all odd tokens; groups that merge nothing
    stay as they are. Returns target [G, t] and anchor [G, K] as in `Merge`.
    """
    groups, length, _ = metric.shape
    device = metric.device
    width = max((n - r for n, r in zip(counts, merged, strict=True)), default=0)
    count, gone = put(counts, device), put(merged, device)[:, None]
    partner, similarity = best_match(metric, count, protected=protected)
    rank = inverse(order_by(best=settle(similarity, similarity > -torch.inf)))
    slots = torch.arange(rank.shape[1], device=device).expand(groups, -1)
    unmerged = rank >= gone
    real = 2 * slots < count[:, None]
    row = rank - gone if order == "similarity" else (unmerged & real).long().cumsum(1) - 1
    heads = (count[:, None] + 1) // 2 - gone  # unmerged even tokens of each group
    token = torch.arange(length, device=device).expand(groups, -1)
    target = torch.empty_like(token)
    target[:, ::2] = torch.where(unmerged, row, heads + partner)
    target[:, 1::2] = heads + slots[:, : length // 2]
    target = torch.where(gone > 0, target, token)
    target = torch.where(token < count[:, None], target, width)
    stands = token.new_ones(groups, length, dtype=torch.bool)
    stands[:, ::2] = unmerged
    place = torch.where(stands, target, width)
    anchor = token.new_zeros(groups, width + 1).scatter(1, place, token)[:, :width]
    rows = torch.arange(width, device=device)
    return target, torch.where(rows < count[:, None] - gone, anchor, 0)


def bipartite_merge(
    metric: Tensor,
    counts: Sequence[int],
    plans: Sequence[Sequence[int]],
    *,
    size: Tensor | None = None,
    order: RowOrder = "similarity",
    protected: int = 0,
    step: Step | None = None,
) -> Merge:
    """Merge each group step by step; later steps compare the means of what earlier ones merged.

    metric: [G, t, C]. counts: tokens of each group. plans: per group the tokens to merge away at every step; a step
    takes at most half of the tokens that can merge. size: [G, t] what the tokens stand for: means are weighted by it
    and sizes add up; without it every step averages plainly, so that a merged token counts once (sizes then count
    input tokens). order, protected: as in `merge_step`; protected tokens need the order "index" to stay in front.
    step: another rule instead of `merge_step`: (metric, counts, merged) -> target, anchor.
    """
    step = step or functools.partial(merge_step, order=order, protected=protected)
    groups, length, _ = metric.shape
    metric = metric.detach()  # decisions have no gradient, and a graph would hold every similarity
    device, now = metric.device, list(counts)
    target = torch.arange(length, device=device).expand(groups, -1)
    anchor, weighted = target, size is not None
    present = target < put(now, device)[:, None]
    mass = present.float() if size is None else torch.where(present, size.float(), 0.0)
    weight = present.float()
    steps = max(map(len, plans), default=0)
    for number in range(steps):
        wanted = [plan[number] if number < len(plan) else 0 for plan in plans]
        gone = [max(0, min(r, (n - protected) // 2)) for n, r in zip(now, wanted, strict=True)]
        into, stands = step(metric, now, gone)
        now = [n - r for n, r in zip(now, gone, strict=True)]
        width = stands.shape[1]
        part = mass if weighted else (mass > 0).float()
        total = _sums(part, into, width + 1)
        share = part / total.gather(1, into).clamp(min=torch.finfo(torch.float32).tiny)
        if number + 1 < steps:
            metric = merge_rows(metric, into, share, width, dtype=torch.float32)
        # A token behind its group's end stays behind it: the spare row of the last step has no weight in this one.
        inside = target.clamp(max=into.shape[1] - 1)
        weight = weight * share.gather(1, inside)
        target = torch.where(present, into.gather(1, inside), width)
        anchor = anchor.gather(1, stands)
        mass = _sums(mass, into, width + 1)[:, :width]
    width = anchor.shape[1]
    left = torch.arange(width, device=device) < put(now, device)[:, None]
    return Merge(torch.where(present, target, width), weight, torch.where(left, anchor, 0), mass, tuple(now))


def merge_rows(x: Tensor, target: Tensor, weight: Tensor, rows: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Weighted sums of the rows that merge: x [G, t, D] -> [G, rows, D], summed in float32.

    target: [G, t], tokens with target `rows` go nowhere. weight: [G, t]. dtype: of the result, x's own by default.
    Streams over the tokens.
    """
    groups, _, width = x.shape
    spare = groups * rows  # one row behind all others
    place = torch.where(target < rows, target + rows * torch.arange(groups, device=x.device)[:, None], spare).flatten()
    sums = torch.zeros(spare + 1, width, device=x.device)
    for (some,), (share,), (row,) in blocks(x.flatten(0, 1)[None], weight.flatten()[None], place[None]):
        sums.index_add_(0, row, some.float() * share[:, None])
    return sums[:-1].view(groups, rows, width).to(dtype or x.dtype)


def unmerge(x: Tensor, target: Tensor) -> Tensor:
    """Give every token the row it ended in: x [G, K, D], target [G, t] -> [G, t, D]; zeros where target is K."""
    return take_rows(torch.nn.functional.pad(x, (0, 0, 0, 1)), target)


def group_places(group: Tensor, mask: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Where the tokens of every group lie, so that groups of all items can be handled side by side.

    group: [I, N] numbers of each item's groups, 0 and up. mask: [I, N] bool, False belongs to no group. sizes: tokens
    of each group of each item; empty groups are left out. Returns [G, t] places in the flattened [I * N], in token
    order; 0 behind a group's end.

    >>> group_places(torch.tensor([[0, 1, 0, 1, 1]]), torch.ones(1, 5, dtype=torch.bool), [[2, 3]]).tolist()
    [[0, 2, 0], [1, 3, 4]]
    """
    width, device = group.shape[1], group.device
    last = max(map(len, sizes), default=0)
    order = torch.where(mask, group, last).argsort(dim=1, stable=True)
    order = (order + width * torch.arange(len(sizes), device=device)[:, None]).flatten()
    starts = [i * width + sum(row[:g]) for i, row in enumerate(sizes) for g in range(len(row)) if row[g]]
    counts = [count for row in sizes for count in row if count]
    first, count = put(starts, device)[:, None], put(counts, device)[:, None]
    steps = torch.arange(max(counts, default=0), device=device)
    inside = steps < count
    return torch.where(inside, order[torch.where(inside, first + steps, 0)], 0)


def lay_out(
    merge: Merge, rows: Tensor, places: Tensor, shape: tuple[int, int], *, raster: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Put merged rows on tokens of their items, which then stand for what was merged into them.

    rows: [G, K, D] as `merge_rows` gives them, places: [G, t] as `group_places` does, shape: (I, N). The tokens that
    stay are the anchors of each group. Row after row takes the next one, so that the rows keep the order of the
    algorithm; raster: every row takes its own. Returns keep [I, N], tokens [I, N, D] (zeros elsewhere) and merged_into
    [I, N], the token of the same item that absorbed each one, -1 outside all groups.
    """
    items, width = shape
    slots, device = items * width, rows.device
    count = put(merge.counts, device)[:, None]
    left = torch.arange(merge.anchor.shape[1], device=device) < count
    last = merge.target.shape[1]
    seat = merge.anchor if raster else torch.where(left, merge.anchor, last).sort(dim=1).values.clamp(max=last - 1)
    seat = torch.where(left, places.gather(1, seat), slots)  # everything else goes to a spare slot that is cut off
    kept = torch.zeros(slots + 1, dtype=torch.bool, device=device).index_put_((seat,), left)
    tokens = rows.new_zeros(slots + 1, rows.shape[2]).index_put_((seat,), rows)
    present = merge.target < left.shape[1]
    into = torch.nn.functional.pad(seat, (0, 1), value=slots).gather(1, merge.target) % width
    absorbed = torch.full((slots + 1,), -1, device=device).index_put_((torch.where(present, places, slots),), into)
    return kept[:-1].view(shape), tokens[:-1].view(items, width, -1), absorbed[:-1].view(shape)


def _sums(values: Tensor, place: Tensor, width: int) -> Tensor:
    return values.new_zeros(values.shape[0], width).scatter_add(1, place, values)
