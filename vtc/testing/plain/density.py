"""Reference for `vtc.ops.density`: density peaks, one distance at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtc.ops.density import density_peaks, peaks
from vtc.testing.plain import OpCase, Size


def plain_density_peaks(
    x: Tensor, clusters: Tensor, mask: Tensor, most: int = 0, near: int | None = None, capped: bool = False
) -> Tensor:
    """One row after the other."""
    found = torch.full(mask.shape, -1)
    for row, count in enumerate(clusters.tolist()):
        places = [place for place, real in enumerate(mask[row].tolist()) if real]
        if count:
            few = count if near is None else min(near, count if capped else len(places))
            for place, centre in _row(x[row].double(), places, count, few).items():
                found[row, place] = centre
    return found


def _row(x: Tensor, places: list[int], count: int, near: int) -> dict[int, int]:
    away, centres = _centres(x, places, count, near)
    return {i: i if i in centres else min(sorted(centres), key=lambda j: round(away[i, j], 6)) for i in places}


def _centres(x: Tensor, places: list[int], count: int, near: int) -> tuple[dict[tuple[int, int], float], list[int]]:
    """Distances, and the `count` tokens of largest density times distance; near: how many the density looks at."""
    away = {(i, j): float((x[i] - x[j]).norm()) / math.sqrt(x.shape[1]) for i in places for j in places}
    rho = {i: math.exp(-sum(sorted(away[i, j] ** 2 for j in places)[:near]) / near) for i in places}
    dense = sorted(places, key=lambda i: (-round(rho[i], 9), i))
    delta = {i: min((away[i, j] for j in dense[:rank]), default=max(away.values())) for rank, i in enumerate(dense)}
    return away, sorted(places, key=lambda i: (-round(rho[i] * delta[i], 7), i))[:count]


def plain_peaks(x: Tensor, count: Tensor, neighbours: Tensor, mask: Tensor, most: int, nearest: int) -> Tensor:
    """One row after the other."""
    found = torch.zeros_like(mask)
    for row, (wanted, near) in enumerate(zip(count.tolist(), neighbours.tolist(), strict=True)):
        places = [place for place, real in enumerate(mask[row].tolist()) if real]
        if wanted:
            found[row, _centres(x[row].double(), places, wanted, near)[1]] = True
    return found


def _drawn(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    rows, length, most = (4, 23, 5) if size == "small" else (8, 600, 20)
    mask = torch.rand(rows, length, generator=generator) < 0.9
    x = torch.randn(rows, length, 8, generator=generator)
    x[1, 4:9] = x[1, 3]  # equals
    clusters = torch.tensor([most, 1, 0, 3]).repeat(rows // 4)
    return {"x": x, "clusters": clusters, "mask": mask, "most": most}


def _peaks(size: Size) -> dict[str, Any]:
    given = _drawn(size)
    neighbours = torch.full_like(given["clusters"], 4)
    return {"count": given.pop("clusters"), "neighbours": neighbours, "nearest": 4, **given}


def _capped(size: Size) -> dict[str, Any]:
    return {"near": 3, "capped": True, **_drawn(size)}


CASES = (
    OpCase(density_peaks, plain_density_peaks, _drawn),
    OpCase(density_peaks, plain_density_peaks, _capped),
    OpCase(peaks, plain_peaks, _peaks),
)
