"""Neighbours on rasters of tiles, and choosing tokens by two scores and by who stands next to whom.

Tokens carry the tile they belong to (`group` [I, N], numbers below G; tile, frame or crop) and their row and column
inside it. Items and tiles of every size are handled side by side, without loops over any of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vtc.method.groups import Parts
from vtc.ops.rank import dense_rank, run_starts
from vtc.ops.select import top_k

Border = Literal["clamp", "drop"]
STRIDE = 2**40
"""More than the places of any tile."""
HALF = 0.5
"""Coordinates this close are equal: rows and columns are at least one unit apart."""


def tile_places(group: Tensor, row: Tensor, col: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raster number of every token inside its tile, columns of the tile, and places of the tile.

    group: [I, N]. row, col: [I, N] coordinates inside the tile in any unit of at least one per step (a merged or
    shrunk token may lie between two patches); they are numbered from the tile's first row and column, without gaps.
    mask: [I, N] bool. Returns three [I, N] int64 tensors; a place is ``row number * columns + column number``, and a
    tile has rows * columns of them. Entries outside the mask are zero.

    >>> row, col = torch.tensor([[0.5, 0.5, 2.5, 2.5]]), torch.tensor([[4.5, 6.5, 4.5, 6.5]])
    >>> [each.tolist() for each in tile_places(torch.zeros(1, 4).long(), row, col, torch.ones(1, 4).bool())]
    [[[0, 1, 2, 3]], [[2, 2, 2, 2]], [[4, 4, 4, 4]]]
    """
    group = torch.where(mask, group, -1)
    row, col = (dense_rank(each, group, HALF) for each in (row, col))
    height, width = _most(row, group) + 1, _most(col, group) + 1
    place, width, size = (torch.where(mask, each, 0) for each in (row * width + col, width, height * width))
    return place, width, size


def _most(numbers: Tensor, group: Tensor) -> Tensor:
    """[I, N] largest number in each entry's group; groups are numbers from -1 to N - 1, or fewer than N of any size."""
    order = group.argsort(dim=1, stable=True)
    run = run_starts(group.gather(1, order)).long().cumsum(1) - 1  # the groups that are there, numbered without gaps
    most = torch.zeros_like(numbers).scatter_reduce_(1, run, numbers.gather(1, order), "amax")
    return torch.empty_like(numbers).scatter_(1, order, most.gather(1, run))


def neighbours(
    group: Tensor,
    place: Tensor,
    width: Tensor,
    size: Tensor,
    mask: Tensor,
    border: Border = "clamp",
    *,
    whole: bool = False,
) -> Tensor:
    """Positions of the tokens at the left, at the right, above and below: [I, N, 4].

    group, mask: [I, N]; place, width, size: [I, N] as from `tile_places`; tokens of a tile may be missing. border:
    "clamp" takes the places p - 1, p + 1, p - width, p + width limited to 0 .. size - 1, so that the ends of a row
    touch the rows above and below and what would lie outside the tile is its first or last token; "drop" knows only
    neighbours that lie inside the tile and, for left and right, in the same row. A token without a neighbour on one
    side names itself there. whole: no token is missing and tiles lie one behind the other, so that nothing is searched.

    >>> place, every = torch.arange(6)[None], torch.ones(1, 6).bool()
    >>> near = neighbours(torch.zeros(1, 6).long(), place, torch.full((1, 6), 3), torch.full((1, 6), 6), every)
    >>> near[0, 2].tolist(), near[0, 4].tolist()
    ([1, 3, 0, 5], [3, 5, 1, 5])
    """
    width = width.clamp(min=1)  # zero outside the mask
    steps = torch.stack([-torch.ones_like(width), torch.ones_like(width), -width, width], dim=-1)
    target = place[..., None] + steps
    if border == "drop":
        inside = (target >= 0) & (target < size[..., None])
        inside[..., :2] &= target[..., :2] // width[..., None] == (place // width)[..., None]
        target = torch.where(inside, target, place[..., None])
    else:
        target = target.clamp_(min=0).minimum(size[..., None] - 1)
    itself = torch.arange(group.shape[1], device=group.device)[:, None]
    if whole:
        return torch.where(mask[..., None], target.add_((itself[:, 0] - place)[..., None]), itself)
    # One number per place of an item: its tile, then its place. What is masked out gets a number behind them all.
    ordered, order = torch.where(mask, group * STRIDE + place, 2**62).sort(dim=1, stable=True)
    wanted = (group * STRIDE)[..., None] + target
    slot = torch.searchsorted(ordered, wanted.flatten(1)).clamp(max=group.shape[1] - 1)
    found = (ordered.gather(1, slot) == wanted.flatten(1)).view_as(wanted) & mask[..., None]
    return torch.where(found, order.gather(1, slot).view_as(wanted), itself)


def hierarchical(
    object_scores: Tensor,
    deep_scores: Tensor,
    near: Tensor,
    tiles: Parts,
    share: Tensor,
    anchors: Tensor,
    penalty: Tensor | None = None,
    *,
    most: int | None = None,
) -> Tensor:
    """Keep of every tile its anchors, the anchors' neighbours, and the best of the rest by another score.

    object_scores, deep_scores: [I, N], higher is kept, ties go to the lower index. near: [I, N, 4] from `neighbours`.
    share: [R] tokens to keep of each of the R tiles, anchors: [R] how many of them are its best by `object_scores`.
    Where anchors and neighbours exceed the share, the anchors stay and the neighbours with the best object scores.
    Returns bool [I, N].

    most: no tile keeps more, where the host knows. penalty: [I, 1] makes the exclusion inexact: instead of leaving
    anchors and neighbours out, their deep scores are lowered by so much and share minus their number chosen from all
    tokens, so that some may be chosen twice and fewer than `share` stay.
    """
    middle, deep = tiles.take(object_scores), tiles.take(deep_scores)
    chosen = tiles.best(middle, anchors, most)
    beside = tiles.give(chosen).long()[..., None].expand_as(near)
    touched = torch.zeros_like(object_scores, dtype=torch.long).scatter_add(1, near.flatten(1), beside.flatten(1))
    union = (chosen | (tiles.take(touched) > 0)) & tiles.mask
    union = top_k(middle.masked_fill(chosen, torch.inf), share, union, most=most)
    others = tiles.mask & ~union if penalty is None else tiles.mask
    if penalty is not None:
        lowered = deep - penalty.repeat_interleave(len(deep) // len(penalty), 0)
        deep = torch.where(union, lowered, deep)
    return tiles.give(union | top_k(deep, share - union.sum(1), others, most=most))
