"""References for `vtc.ops.grid` and `vtc.ops.hashing`: one raster cell after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtc.ops.grid import Grid, absorbing_cell, cell_centres, pool_grid, strided
from vtc.ops.hashing import fingerprint, joint_fingerprint, uniform
from vtc.testing.plain import OpCase, Size


def plain_strided(height: int, width: int, keep: int) -> Tensor:
    """About sqrt(keep) centred rows share the tokens evenly; in each the columns are centred."""
    rows = max(1, math.floor(height * math.sqrt(keep / (height * width)) + 0.5), math.ceil(keep / width))
    rows = min(height, rows)
    slots = [j * rows // keep for j in range(keep)]
    chosen: list[int] = []
    for slot in range(rows):
        held = slots.count(slot)
        row = math.floor((slot + 0.5) * height / rows)
        chosen += [row * width + math.floor((i + 0.5) * width / held) for i in range(held)]
    return torch.tensor(chosen)


def _cells(size: int, parts: int) -> list[range]:
    """The cells of adaptive pooling; neighbours overlap where `parts` does not divide `size`."""
    return [range(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def plain_pool_grid(tokens: Tensor, grid: Grid, output: Grid) -> Tensor:
    """The mean over every cell."""
    volume = tokens.reshape(len(tokens), *grid, -1)
    pooled = [
        torch.stack([volume[:, f, r, c] for f in frames for r in rows for c in columns]).mean(0)
        for frames in _cells(grid[0], output[0])
        for rows in _cells(grid[1], output[1])
        for columns in _cells(grid[2], output[2])
    ]
    return torch.stack(pooled, dim=1)


def plain_cell_centres(grid: Grid, output: Grid) -> Tensor:
    """The token in the middle of every cell, by its place on every axis."""
    middle = [[math.floor((i + 0.5) * size / n) for i in range(n)] for size, n in zip(grid, output, strict=True)]
    places = [(f * grid[1] + r) * grid[2] + c for f in middle[0] for r in middle[1] for c in middle[2]]
    return torch.tensor(places)


def plain_absorbing_cell(grid: Grid, output: Grid) -> Tensor:
    """The cell in which the middle of every token lies."""
    inside = [[math.floor((i + 0.5) * n / size) for i in range(size)] for size, n in zip(grid, output, strict=True)]
    cells = [(f * output[1] + r) * output[2] + c for f in inside[0] for r in inside[1] for c in inside[2]]
    return torch.tensor(cells)


def _rasters(size: Size) -> dict[str, Any]:
    return {"grid": (2, 5, 7), "output": (1, 3, 4)} if size == "small" else {"grid": (8, 27, 27), "output": (8, 14, 14)}


def _pooled(size: Size) -> dict[str, Any]:
    given = _rasters(size)
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randn(2, math.prod(given["grid"]), 16, generator=generator), **given}


def _strided(size: Size) -> dict[str, Any]:
    return {"height": 5, "width": 7, "keep": 9} if size == "small" else {"height": 96, "width": 96, "keep": 2304}


def _drawn(size: Size) -> dict[str, Any]:
    items, tokens = (2, 5) if size == "small" else (32, 20000)
    return {"key": torch.arange(items) * 7919, "token": torch.arange(tokens).expand(items, -1), "seed": 3}


def _pixels(size: Size) -> dict[str, Any]:
    shape = (2, 3, 5) if size == "small" else (8, 3, 336, 336)
    return {"values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


CASES = (
    OpCase(strided, plain_strided, _strided),
    OpCase(pool_grid, plain_pool_grid, _pooled, 1e-5),
    OpCase(cell_centres, plain_cell_centres, _rasters),
    OpCase(absorbing_cell, plain_absorbing_cell, _rasters),
    OpCase(uniform, None, _drawn),
    OpCase(fingerprint, None, _pixels),
    OpCase(joint_fingerprint, None, lambda size: {"keys": torch.arange(6), "counts": [2, 4]}),
)
