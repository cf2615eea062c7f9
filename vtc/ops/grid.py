"""Rasters: which output grid a budget pays for, where strided tokens lie, and pooling on the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def output_grid(height: int, width: int, keep: int) -> tuple[int, int]:
    """The grid (h', w') with h' * w' <= keep whose cells are closest to the shape of the input's.

    A grid that uses less than nine tenths of the budget is taken only if no better-filled one is at most 2:1 distorted.

    >>> output_grid(12, 12, 16), output_grid(12, 12, 72), output_grid(24, 24, 192), output_grid(12, 12, 5)
    ((4, 4), (9, 8), (13, 14), (2, 2))
    """
    options = [(h, min(width, keep // h)) for h in range(1, min(height, keep) + 1)]

    def distortion(option: tuple[int, int]) -> float:
        return abs(math.log((option[0] / height) / (option[1] / width)))

    square = [o for o in options if distortion(o) <= math.log(2) + 1e-9] or options
    full = [o for o in square if o[0] * o[1] >= 0.9 * keep] or [
        max(square, key=lambda o: (o[0] * o[1], -distortion(o)))
    ]
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


def pool_grid(tokens: Tensor, grid: tuple[int, int, int], output: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of each frame: [I, t*h*w, D] -> [I, t*h'*w', D], computed in float32."""
    frames, height, width = grid
    maps = tokens.float().reshape(-1, height, width, tokens.shape[-1]).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.adaptive_avg_pool2d(maps, output).flatten(2).transpose(1, 2)
    return pooled.reshape(tokens.shape[0], frames * output[0] * output[1], -1).to(tokens.dtype)


def cell_centres(grid: tuple[int, int, int], output: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Raster index of the token at the centre of every pooled cell, ascending; [t*h'*w']."""
    frames, height, width = grid
    row = (2 * torch.arange(output[0], device=device) + 1) * height // (2 * output[0])
    col = (2 * torch.arange(output[1], device=device) + 1) * width // (2 * output[1])
    frame = torch.arange(frames, device=device) * (height * width)
    return (frame[:, None, None] + row[:, None] * width + col).flatten()
