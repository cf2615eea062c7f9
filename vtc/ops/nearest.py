"""Tokens that join others: the most similar one that is kept, and means of what joined. Nothing of size N x N."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtc.ops.merge import merge_rows
from vtc.ops.select import TIE, first_best, front_pack, group_sizes, take_rows

BLOCK = 1 << 24
"""Similarities held at a time."""


def nearest(x: Tensor, others: Tensor, there: Tensor, block: int = BLOCK) -> Tensor:
    """[G, S] place of the other token with the highest cosine, the lowest of equals; 0 where there is none.

    x: [G, S, C]. others: [G, T, C]. there: [G, T] bool, the others there are. Streams over x: `block` similarities are
    held at a time.

    >>> x, others = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [3.0, 4.0], [6.0, 8.0]]])
    >>> nearest(x, others, torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[1]]
    """
    unit = torch.nn.functional.normalize(others.float(), dim=2).nan_to_num_(0.0)

    def best(some: Tensor, products: Tensor) -> Tensor:
        return first_best(products, TIE * some.norm(dim=2, keepdim=True))  # a token's own length ranks nothing

    return streamed(x, unit, there, best, block)


def streamed(
    x: Tensor, others: Tensor, there: Tensor, read: Callable[[Tensor, Tensor], Tensor], block: int = BLOCK
) -> Tensor:
    """[G, S] what `read` makes of tokens and their products with the others there are, -inf with those that are not.

    x, others, there, block: as in `nearest`. read: x [G, s, C] and products [G, s, T] of some tokens -> [G, s].

    >>> x, others = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [3.0, 4.0], [6.0, 8.0]]])
    >>> streamed(x, others, torch.tensor([[True, True, False]]), lambda _, products: products.amax(2)).tolist()
    [[3.0]]
    """
    absent = there.float().log()[:, None]  # 0 or -inf: to add it is several times as fast as to fill in a mask
    found = []
    for some in torch.split(x, max(1, block // max(1, there.numel())), 1):
        some = some.float()
        found.append(read(some, torch.bmm(some, others.transpose(1, 2)).add_(absent)))
    return torch.cat(found, 1)


def nearest_target(metric: Tensor, target: Tensor, left: Tensor, most: int, block: int = BLOCK) -> Tensor:
    """For every token that is left the target of its crop with the highest cosine similarity; targets name themselves.

    metric: [G, S, C]. target, left: [G, S] bool, at most `most` targets in a crop, all among those left. Equal
    similarities go to the lower target. Returns [G, S] places, -1 where nothing is left or the crop has no target.
    Streams over the tokens: `block` similarities are held at a time.
    """
    if most == 0:
        return torch.full(target.shape, -1, dtype=torch.long, device=metric.device)
    place = front_pack(target, most)
    there = torch.arange(place.shape[1], device=place.device) < target.sum(1, keepdim=True)
    into = place.gather(1, nearest(metric, take_rows(metric, place), there, block))
    into = torch.where(target, torch.arange(into.shape[1], device=into.device), into)
    return torch.where(left & target.any(1, keepdim=True), into, -1)


def means(x: Tensor, into: Tensor, most: int | None = None) -> Tensor:
    """Every token that others join as the mean of these, [G, S, D] like x; rows of others mean nothing.

    into: [G, S] the place each token goes to, its own where it stays, -1 for nowhere. most: no group has more tokens
    that stay, where the host knows.

    >>> means(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[0, 0, -1]]))[0, 0].tolist()
    [3.0]
    """
    length, there = into.shape[1], into >= 0
    root = into.clamp(min=0)
    size = group_sizes(root, length, there)
    weight = 1 / size.gather(1, root).clamp(min=1)
    if most is None:
        return merge_rows(x, torch.where(there, root, length), weight, length)
    stays = into == torch.arange(length, device=into.device)
    number, place = stays.cumsum(1) - 1, front_pack(stays, most)
    rows = merge_rows(x, torch.where(there, number.gather(1, root), most), weight, most)
    group = torch.arange(len(x), device=x.device)[:, None]
    return torch.empty_like(x).index_put_((group, place), rows)
