"""Clusters around density peaks, as several released methods find them: on the matrix of all distances."""

from __future__ import annotations

import torch
from torch import Tensor


def peaks(x: Tensor, count: int, near: int) -> Tensor:
    """[G, count] places of the dense rows of [G, M, D] that are far from denser ones; densities over `near` rows."""
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    density = (-distance.topk(near, dim=2, largest=False).values.square().mean(2)).exp()
    denser = density[:, None, :] > density[:, :, None]
    gap = distance.masked_fill(~denser, torch.inf).amin(2)
    gap = torch.where(denser.any(2), gap, distance.amax((1, 2))[:, None])
    places: Tensor = (density * gap).topk(count, dim=1).indices.sort(1).values
    return places


def density_peaks(x: Tensor, count: int, near: int) -> tuple[Tensor, Tensor]:
    """Centres [G, count] of clusters of [G, M, D], and which of them each row joins [G, M]."""
    centres = peaks(x, count, near)
    chosen = x.gather(1, centres[..., None].expand(-1, -1, x.shape[2]))
    label = torch.cdist(x, chosen).argmin(2)
    return centres, label.scatter(1, centres, torch.arange(count).expand_as(centres))


def group_means(x: Tensor, label: Tensor, count: int) -> Tensor:
    """[G, count, D] means of the rows [G, M, D] with each label, through a one-hot matrix."""
    hot = torch.nn.functional.one_hot(label, count).float()
    return hot.transpose(1, 2) @ x / hot.sum(1).clamp(min=1)[..., None]
