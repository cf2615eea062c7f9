"""Clusters around density peaks: centres are dense and far from whatever is denser (DPC-KNN). Nothing of size N x N."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.ops.checks import numbers
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import TIE, first_best, front_pack, settle, take_rows, top_k

BLOCK = 2**24
"""Distances held at once."""


def density_peaks(
    x: Tensor, clusters: Tensor, mask: Tensor, *, most: int, near: int | None = None, capped: bool = False
) -> Tensor:
    """For every token the centre of its cluster, a place in its row; centres name themselves, -1 outside the mask.

    With ``d_ij = |x_i - x_j| / sqrt(D)``, the density of token i is ``rho_i = exp(-mean d_ij^2)`` over the c nearest
    tokens, itself included, c being the number of clusters, and ``delta_i`` its distance to the nearest denser token
    (of the densest: the largest distance there is). The c tokens of largest ``rho_i delta_i`` are centres, and every
    other token goes to the nearest of them. Of equals the lower index is denser, is a centre, is nearer.

    x: [G, M, D]. clusters: [G] counts, at most the row's tokens and at most `most`. mask: [G, M] bool. near: the
    density is over so many tokens, or all of a row that has fewer, instead of c. capped: and over c where c is less.
    Streams over the tokens. Returns [G, M], -1 in rows that have no cluster.

    >>> x = torch.tensor([[[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]])
    >>> density_peaks(x, torch.tensor([2]), torch.ones(1, 6, dtype=torch.bool), most=2).tolist()
    [[0, 0, 0, 3, 3, 3]]
    """
    x = numbers(x.detach(), mask).float()
    length = x.square().sum(2)
    steps = torch.arange(x.shape[1], device=x.device)
    there = torch.arange(min(most, x.shape[1]), device=x.device) < clusters[:, None]
    neighbours = clusters if near is None else (clusters if capped else mask.sum(1)).clamp(max=near)
    peak = _peaks(x, length, clusters, neighbours, mask, most=most, nearest=near or most)
    place = front_pack(peak, there.shape[1])
    nearest = [
        first_best(-squares.masked_fill(~there[:, None], torch.inf).sqrt())
        for _, squares in _squares(x, length, take_rows(x, place), length.gather(1, place))
    ]
    centre = torch.where(peak, steps, place.gather(1, torch.cat(nearest, 1)))
    return torch.where(mask & (clusters > 0)[:, None], centre, -1)


def peaks(x: Tensor, count: Tensor, neighbours: Tensor, mask: Tensor, *, most: int, nearest: int) -> Tensor:
    """Mark the `count` tokens of each row that are dense and far from whatever is denser (see `density_peaks`).

    x: [G, M, D]. count: [G], at most the row's tokens and at most `most`. neighbours: [G] how many of the nearest
    tokens, itself included, the density is the mean over; at most the row's tokens and at most `nearest`. mask: [G, M]
    bool. Streams over the tokens. Returns bool [G, M].

    >>> x, two = torch.tensor([[[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]]]), torch.tensor([2])
    >>> peaks(x, two, two, torch.ones(1, 6, dtype=torch.bool), most=2, nearest=2).int().tolist()
    [[1, 0, 0, 1, 0, 0]]
    """
    x = numbers(x.detach(), mask).float()
    return _peaks(x, x.square().sum(2), count, neighbours, mask, most=most, nearest=nearest)


def _peaks(
    x: Tensor, length: Tensor, count: Tensor, neighbours: Tensor, mask: Tensor, *, most: int, nearest: int
) -> Tensor:
    """See `peaks`; length: [G, M] squared length of each token."""
    near = torch.arange(min(nearest, x.shape[1]), device=x.device) < neighbours[:, None]
    means, largest = [], x.new_zeros(len(x), 1)
    held = [*_squares(x, length, x, length)] if len(x) * x.shape[1] ** 2 <= BLOCK else None
    for _, squares in held or _squares(x, length, x, length):
        squares = squares.masked_fill(~mask[:, None], torch.inf)
        lowest = squares.topk(near.shape[1], dim=2, largest=False, sorted=True).values
        means.append(torch.where(near[:, None], lowest, 0).sum(2) / neighbours[:, None].clamp(min=1))
        largest = torch.maximum(largest, torch.where(squares < torch.inf, squares, 0).amax(2).amax(1, keepdim=True))
    density = settle(-torch.cat(means, 1), mask)
    rank = inverse(order_by(best=density))
    gaps = [
        squares.masked_fill(~(mask[:, None] & (rank[:, None] < rank[:, some, None])), torch.inf).amin(2)
        for some, squares in held or _squares(x, length, x, length)
    ]
    gap = torch.minimum(torch.cat(gaps, 1), largest).sqrt()
    return top_k(density.exp() * gap, count, mask, most=most)


def _squares(x: Tensor, length: Tensor, others: Tensor, away: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the tokens, and [G, m, n] squared distances of those to the others, divided by D.

    length, away: [G, M] squared length of each token, and of the others.
    """
    size = max(1, BLOCK // max(1, others.shape[0] * others.shape[1]))
    for first in range(0, x.shape[1], size):
        some = slice(first, first + size)
        sums = length[:, some, None] + away[:, None]
        squares = sums - 2 * torch.bmm(x[:, some], others.transpose(1, 2))
        yield some, torch.where(squares > TIE * sums, squares, 0) / x.shape[2]  # rounding is no distance
