"""Clusters around density peaks, as several released methods find them: on the matrix of all distances."""

from __future__ import annotations

import torch
from torch import Tensor


def prominence(x: Tensor, near: int | Tensor, real: Tensor | None = None) -> Tensor:
    """[G, M] density of the rows [G, M, D] times the distance to a denser one; over the `near` nearest, each included.

    near: the same everywhere, or [G]. real: [G, M] bool, the rows there are; the others get -inf.
    """
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    if real is not None:
        distance = distance.masked_fill(~(real[:, None] & real[:, :, None]), torch.inf)
    most = near if isinstance(near, int) else int(near.max())
    squares = distance.topk(min(most, x.shape[1]), dim=2, largest=False).values.square()
    if isinstance(near, Tensor):
        squares = squares.masked_fill(torch.arange(squares.shape[2]) >= near[:, None, None], torch.inf)
    count = (squares < torch.inf).sum(2)
    density = (-squares.masked_fill(squares == torch.inf, 0).sum(2) / count.clamp(min=1)).exp()
    density = density.masked_fill(count == 0, -1)
    denser = density[:, None, :] > density[:, :, None]
    gap = distance.masked_fill(~denser, torch.inf).amin(2)
    largest = distance.masked_fill(distance == torch.inf, 0).amax((1, 2))
    product: Tensor = density * torch.where(denser.any(2), gap, largest[:, None])
    return product


def density_peaks(x: Tensor, count: Tensor, near: int | Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[G, M] bool, the `count` [G] centres of the clusters of [G, M, D], and [G, M] the place of each row's centre."""
    rank = prominence(x, near, real).argsort(dim=1, descending=True, stable=True).argsort(1)
    centre = rank < count[:, None]
    into = torch.cdist(x, x).masked_fill(~centre[:, None], torch.inf).argmin(2)
    return centre, torch.where(centre, torch.arange(x.shape[1]), into)


def means(x: Tensor, into: Tensor, real: Tensor | None = None) -> Tensor:
    """[G, M, D] at each place the mean of the rows that go there."""
    weight = torch.ones(into.shape) if real is None else real.float()
    sums = torch.zeros_like(x).scatter_add(1, into[..., None].expand_as(x), x * weight[..., None])
    return sums / torch.zeros(into.shape).scatter_add(1, into, weight).clamp(min=1)[..., None]
