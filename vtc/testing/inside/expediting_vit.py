"""Expediting ViT, one patch and cluster at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtc.methods.expediting_vit import ExpeditingViT
from vtc.ops.grid import output_grid
from vtc.testing.encoders import BLOCKS, SIDE, Act, Seen
from vtc.testing.inside import InsideCase


def distance(a: Tensor, b: Tensor) -> float:
    """Squared, of two rows."""
    return float((a.double() - b.double()).square().sum())


def cluster(rows: Tensor, grid: tuple[int, int], small: tuple[int, int], method: ExpeditingViT) -> list[Tensor]:
    """Clusters of the patches [H * W, D], in raster order."""
    (height, width), (h, w) = grid, small
    centres = []
    for i in range(h):
        for j in range(w):
            cell = [
                rows[r * width + c]
                for r in range(i * height // h, math.ceil((i + 1) * height / h))
                for c in range(j * width // w, math.ceil((j + 1) * width / w))
            ]
            centres.append(torch.stack(cell).mean(0))
    reach = method.window // 2
    for _ in range(method.iterations):
        sums, total = [torch.zeros_like(rows[0]) for _ in centres], [0.0] * len(centres)
        for n, x in enumerate(rows):
            own = (n // width * h // height, n % width * w // width)
            near = [k for k in range(h * w) if abs(k // w - own[0]) <= reach and abs(k % w - own[1]) <= reach]
            weights = torch.tensor([-method.temperature * distance(x, centres[k]) for k in near]).softmax(0).tolist()
            for k, weight in zip(near, weights, strict=True):
                sums[k] = sums[k] + weight * x
                total[k] += weight
        centres = [one / weight for one, weight in zip(sums, total, strict=True)]
    return centres


def rebuild(refined: Tensor, before: Tensor, centres: list[Tensor], method: ExpeditingViT) -> Tensor:
    """[N, D] a row for every patch."""
    rows = []
    for x in before:
        apart = [distance(x, centre) for centre in centres]
        near = [k for _, k in sorted((far, k) for k, far in enumerate(apart))][: method.neighbours]
        weights = [math.exp(-method.temperature * (apart[k] - apart[near[0]])) for k in near]
        total = sum(weights) if method.norm == "sum" else math.sqrt(sum(w * w for w in weights))
        rows.append(torch.stack([w / total * refined[k] for k, w in zip(near, weights, strict=True)]).sum(0))
    return torch.stack(rows)


def plain(method: ExpeditingViT, image: Tensor, lead: int, keep: int | None) -> Act:
    """Clusters in front of one block, by default the second of three, and all patches behind the last."""
    first, small = method.layer or 1, method.clusters or output_grid(SIDE, SIDE, keep or 0)
    kept: list[Tensor] = []

    def act(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        if layer == first:
            kept[:] = rows[lead:], *cluster(rows[lead:], (SIDE, SIDE), small, method)
            rows = torch.cat([rows[:lead], torch.stack(kept[1:])])
        if layer == BLOCKS and method.reconstruct:
            rows = torch.cat([rows[:lead], rebuild(rows[lead:], kept[0], kept[1:], method)])
        return rows, None

    return act


LATE = {"layer": 2, "temperature": 0.02, "window": 3, "neighbours": 3}
NARROW = {"clusters": (2, 3), "window": 1, "neighbours": 2, "norm": "l2"}
CASE = InsideCase(plain, ({}, {"reconstruct": False}, NARROW, LATE))
