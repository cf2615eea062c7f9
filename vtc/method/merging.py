"""Merging the tokens of a view: which tokens form a group, how many each group keeps, and where the means go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vtc.method.base import Scope, Selection, StageView
from vtc.ops.merge import bipartite_merge, group_places, lay_out, merge_plan, merge_rows
from vtc.ops.select import apportion_host

Sizes = list[list[int]]
"""Tokens of every group of every item, on the host."""


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
    crop = torch.where(items.mask, view.crop, -1)
    width = max(layout.n_crops for layout in items.layouts)
    counted = items.token.new_zeros(len(items), width + 1).scatter_add(1, crop + 1, torch.ones_like(crop))
    return crop, counted[:, 1:].tolist()


def share(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split `keep` tokens over groups in proportion to their sizes, at least one for every group that has any.

    >>> share(10, [4, 30, 0, 6]), share(98, [196, 196])
    ([2, 6, 0, 2], [49, 49])
    """
    filled = [min(1, size) for size in sizes]
    more = [size - one for size, one in zip(sizes, filled, strict=True)]
    rest = apportion_host(max(0, keep - sum(filled)), more)
    return [one + extra for one, extra in zip(filled, rest, strict=True)]
