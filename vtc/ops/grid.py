"""Rasters: which output grid a budget pays for, where strided tokens lie, and pooling on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vtc.ops.select import apportion_host

Grid = tuple[int, int, int]
"""(frames or tiles, rows, columns) of a raster."""


@lru_cache(maxsize=1024)
def output_grid(height: int, width: int, keep: int) -> tuple[int, int]:
    """The grid (h', w') with h' * w' <= keep whose cells are closest to the shape of the input's.

    A grid that uses less than nine tenths of the budget is taken only if no better-filled one is at most 2:1 distorted.

    >>> output_grid(12, 12, 16), output_grid(12, 12, 72), output_grid(24, 24, 192), output_grid(12, 12, 110)
    ((4, 4), (9, 8), (13, 14), (10, 10))
    """
    options = [(h, w) for h in range(1, min(height, keep) + 1) for w in range(1, min(width, keep // h) + 1)]

    def distortion(option: tuple[int, int]) -> float:
        return abs(math.log((option[0] / height) / (option[1] / width)))

    square = [o for o in options if distortion(o) <= math.log(2) + 1e-9] or options
    full = [o for o in square if o[0] * o[1] >= 0.9 * keep]
    if not full:
        full = [max(square, key=lambda o: (o[0] * o[1], -distortion(o)))]
    return min(full, key=lambda o: (distortion(o), -o[0] * o[1]))


def strided(height: int, width: int, keep: int, device: torch.device | None = None) -> Tensor:
    """`keep` raster indices spread evenly over both axes of a height x width grid, ascending; [keep].

    About sqrt(keep) rows are visited, centred; each holds keep / rows tokens, centred columns, counts differing by at
    most one, so that the count is exact for every keep <= height * width.

    >>> strided(4, 4, 4).tolist()
    [5, 7, 13, 15]
    """
    rows = min(height, max(1, math.floor(height * math.sqrt(keep / (height * width)) + 0.5), -(-keep // width)))
    j = torch.arange(keep, device=device)
    slot = j * rows // keep
    first = -(-slot * keep // rows)
    held = -(-(slot + 1) * keep // rows) - first
    row = (2 * slot + 1) * height // (2 * rows)
    col = (2 * (j - first) + 1) * width // (2 * held)
    return row * width + col


def output_raster(grid: Grid, keep: int) -> Grid:
    """The coarser raster with at most `keep` cells: every frame as in `output_grid`, frames merged if keep < frames.

    >>> output_raster((2, 4, 4), 9), output_raster((4, 3, 3), 2)
    ((2, 2, 2), (2, 1, 1))
    """
    frames, height, width = grid
    if keep < frames:
        return keep, 1, 1
    return frames, *output_grid(height, width, keep // frames)


def frame_lines(regions: Sequence[Grid]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column of every token in its frame, and rows and columns of the frame, [n] each.

    regions: rasters one behind the other, n tokens in all.

    >>> [lines.tolist() for lines in frame_lines([(1, 2, 2), (2, 1, 1)])]
    [[0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0], [2, 2, 2, 2, 1, 1], [2, 2, 2, 2, 1, 1]]
    """
    parts = []
    for frames, height, width in regions:
        row = torch.arange(height).repeat_interleave(width).repeat(frames)
        col = torch.arange(width).repeat(frames * height)
        parts.append(torch.stack([row, col, torch.full_like(row, height), torch.full_like(row, width)]))
    row, col, height, width = torch.cat(parts, 1) if parts else torch.empty(4, 0, dtype=torch.long)
    return row, col, height, width


def split_budget(regions: Sequence[Grid], keep: int) -> list[tuple[int, Grid, int]]:
    """(first token, raster, tokens to keep) of rasters that lie one behind the other, in proportion to their sizes.

    Rasters that get no token are left out.

    >>> split_budget([(1, 2, 2), (1, 4, 3)], 4)
    [(0, (1, 2, 2), 1), (4, (1, 4, 3), 3)]
    """
    sizes = [math.prod(region) for region in regions]
    starts, shares = accumulate(sizes, initial=0), apportion_host(keep, sizes)
    return [(start, region, share) for start, region, share in zip(starts, regions, shares, strict=False) if share]


def pool_grid(tokens: Tensor, grid: Grid, output: Grid) -> Tensor:
    """Adaptive average pooling: [I, t*h*w, D] -> [I, t'*h'*w', D], computed in float32."""
    items, _, width = tokens.shape
    if grid[0] == output[0]:  # frame by frame; the kernel for flat maps is the faster one
        flat = tokens.float().reshape(-1, *grid[1:], width).movedim(-1, 1)
        pooled = torch.nn.functional.adaptive_avg_pool2d(flat, output[1:]).flatten(2).transpose(1, 2)
    else:
        maps = tokens.float().reshape(items, *grid, width).movedim(-1, 1)
        pooled = torch.nn.functional.adaptive_avg_pool3d(maps, output).flatten(2).transpose(1, 2)
    return pooled.reshape(items, -1, width).to(tokens.dtype)


def cell_centres(grid: Grid, output: Grid, device: torch.device | None = None) -> Tensor:
    """Raster index of the token at the centre of every pooled cell, ascending; [t'*h'*w']."""
    steps = [(2 * torch.arange(n, device=device) + 1) * size // (2 * n) for size, n in zip(grid, output, strict=True)]
    return _raster_index(steps, grid).flatten()


def absorbing_cell(grid: Grid, output: Grid, device: torch.device | None = None) -> Tensor:
    """[t*h*w] number of the pooled cell a token lies in; where adaptive cells overlap, the one its middle lies in.

    The token at a cell's centre (`cell_centres`) is always absorbed by that cell.
    """
    middles = [2 * torch.arange(size, device=device) + 1 for size in grid]  # in half tokens
    steps = [middle * n // (2 * size) for middle, size, n in zip(middles, grid, output, strict=True)]
    return _raster_index(steps, output).flatten()


def _raster_index(steps: Sequence[Tensor], grid: Grid) -> Tensor:
    frame, row, col = steps
    return (frame[:, None, None] * grid[1] + row[:, None]) * grid[2] + col
