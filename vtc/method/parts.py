"""Items in parts, their crops or frames: methods that choose in each part on its own, and merging inside parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.method.base import Scope, Selection, StageView
from vtc.ops.greedy import chosen
from vtc.ops.merge import bipartite_merge, group_places, lay_out, merge_plan, merge_rows
from vtc.ops.select import apportion, apportion_host, group_sizes, in_groups, out_of_groups

Sizes = list[list[int]]
"""Tokens of every group of every item, on the host."""


# --- choosing
@dataclass(frozen=True, eq=False)
class Groups:
    """R groups of at most W tokens: the items themselves, or their crops one behind the other.

    place: [R, W] of a group's tokens in its item, None where a group is an item. mask: [R, W]. keep: [R] tokens that a
    group may keep. steps: no group may keep more.
    """

    place: Tensor | None
    mask: Tensor
    keep: Tensor
    steps: int
    items: Tensor

    @staticmethod
    def of(view: StageView, scope: Scope) -> Groups:
        """The groups of a view; with scope "crop" an item's budget is split in proportion to the sizes of its crops."""
        items, mask = view.items, view.items.mask
        keep = torch.tensor(view.keep, device=mask.device)
        if scope == "item" or view.most_crops == 1:
            return Groups(None, mask, keep, max(view.keep, default=0), mask)
        sizes = [layout.crop_sizes for layout in items.layouts]
        width = min(mask.shape[1], max(map(max, sizes)))
        place, real = in_groups(view.crop, view.most_crops, width, mask)
        share = apportion(keep, real.sum(2))
        steps = max(map(_largest_share, view.keep, items.counts, sizes))
        return Groups(place.flatten(0, 1), real.flatten(0, 1), share.flatten(), steps, mask)

    def take(self, values: Tensor) -> Tensor:
        """[I, N, ...] of the items -> [R, W, ...] of the groups."""
        if self.place is None:
            return values
        item = torch.arange(len(values), device=values.device).repeat_interleave(len(self.place) // len(values))
        return values[item[:, None], self.place]

    def chosen(self, order: Tensor) -> Tensor:
        """Mark what the groups keep of their orders [R, steps]; bool [I, N] over the items."""
        marks = chosen(order, self.keep, self.mask)
        if self.place is None:
            return marks
        items, length = self.items.shape
        marks, place, real = (each.view(items, -1, each.shape[1]) for each in (marks, self.place, self.mask))
        return out_of_groups(marks, place, real, length)


def _largest_share(keep: int, count: int, sizes: Sequence[int]) -> int:
    """No crop may keep more of the item's `keep` tokens; only a bound where an earlier stage thinned the crops."""
    if sum(sizes) != count:
        return min(keep, max(sizes))
    return max(min(size, size * keep // count + 1) for size in sizes)


# --- merging
def merge_items(
    view: StageView,
    keep: Sequence[int],
    metric: Tensor,
    *,
    scope: Scope = "crop",
    plan: Callable[[int, int], Sequence[int]] = merge_plan,
    weighted: bool = False,
    raster: bool = False,
) -> Selection:
    """Merge the tokens of each item down to `keep`, inside crops, tiles or frames or over the whole item.

    metric: [I, N, C] what similarity is measured on. plan: (tokens of a group, its share of `keep`) -> tokens to merge
    away at each step. weighted: means count what a token already stands for. raster: means stay where their anchor is;
    otherwise they follow one another in the order of the algorithm. Items with fewer tokens to keep than groups are
    merged over all of them.
    """
    items = view.items
    crop, sizes = groups(view, scope)
    joined = [len(row) > 1 and count < sum(map(bool, row)) for row, count in zip(sizes, keep, strict=True)]
    if any(joined):
        crop = torch.where(torch.tensor(joined, device=crop.device)[:, None], 0, crop)
        sizes = [[sum(row)] if one else row for row, one in zip(sizes, joined, strict=True)]
    shares = [share(count, row) for row, count in zip(sizes, keep, strict=True)]
    counts = [count for row in sizes for count in row if count]
    left = [each for part in shares for each in part if each]
    places = group_places(crop, items.mask, sizes)
    tokens = view.tokens.flatten(0, 1)[places]
    merge = bipartite_merge(
        tokens if metric is view.tokens else metric.flatten(0, 1)[places],
        counts,
        [plan(count, each) for count, each in zip(counts, left, strict=True)],
        size=torch.ones_like(places, dtype=torch.float32) if weighted else None,
    )
    rows = merge_rows(tokens, merge.target, merge.weight, merge.anchor.shape[1])
    kept, replaced, into = lay_out(merge, rows, places, (items.mask.shape[0], items.mask.shape[1]), raster=raster)
    number = iter(merge.counts)
    totals = [sum(next(number) for count in row if count) for row in sizes]
    return Selection(kept, counts=totals, tokens=replaced, merged_into=into)


def groups(view: StageView, scope: Scope) -> tuple[Tensor, Sizes]:
    """[I, N] group of every token, and the groups' sizes: crops, tiles or frames, or one group per item.

    Synchronises once where an earlier stage dropped tokens, so that only the device knows how large crops are.
    """
    items = view.items
    several = [layout.n_crops > 1 for layout in items.layouts]
    if scope == "item" or not any(several):
        return torch.zeros_like(items.token), [[count] for count in items.counts]
    whole = all(sum(layout.crop_sizes) == count for layout, count in zip(items.layouts, items.counts, strict=True))
    if whole:
        return view.crop, [list(layout.crop_sizes) for layout in items.layouts]
    return view.crop, group_sizes(view.crop, view.most_crops, items.mask).tolist()


def share(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split `keep` tokens over groups in proportion to their sizes, at least one for every group that has any.

    >>> share(10, [4, 30, 0, 6]), share(98, [196, 196])
    ([2, 6, 0, 2], [49, 49])
    """
    filled = [min(1, size) for size in sizes]
    more = [size - one for size, one in zip(sizes, filled, strict=True)]
    rest = apportion_host(max(0, keep - sum(filled)), more)
    return [one + extra for one, extra in zip(filled, rest, strict=True)]
