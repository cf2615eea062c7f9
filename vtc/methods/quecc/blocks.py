"""How the rasters of an item fall into blocks, one for each token that stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vtc.ops.grid import Grid, absorbing_cell, cell_centres, output_raster, split_budget


@dataclass(frozen=True, eq=False)
class Blocks:
    """The G blocks of an item of n tokens, in the order of the picture.

    owner: [n] block of each token, -1 where a whole raster gets none. centre: [G] the token in the middle of each
    block. taps: [G, stride * stride] the tokens that the places of a convolution's kernel fall on, row by row. widest:
    no block has more tokens than this.
    """

    owner: Tensor
    centre: Tensor
    taps: Tensor
    widest: int


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may meet a training later
def blocks(regions: tuple[Grid, ...], keep: int, stride: int) -> Blocks:
    """Blocks for at most `keep` tokens, as `pool` lays its cells: rasters share them in proportion to their sizes.

    Where stride divides the sides and keep is what that gives, a block is stride x stride tokens and its taps are just
    these; others have sides that differ by at most one, and each place of the kernel takes the nearest token.

    >>> found = blocks(((1, 2, 4),), 2, 2)
    >>> found.owner.tolist(), found.centre.tolist(), found.taps.tolist(), found.widest
    ([0, 0, 1, 1, 0, 0, 1, 1], [5, 7], [[0, 1, 4, 5], [2, 3, 6, 7]], 4)
    >>> blocks(((1, 1, 3),), 1, 2).taps.tolist()  # a row of three tokens under a kernel of 2 x 2
    [[0, 2, 0, 2]]
    """
    owner = torch.full((sum(map(math.prod, regions)),), -1)
    centres, taps, widest, made = [], [], 1, 0
    for first, grid, share in split_budget(regions, keep):
        output = output_raster(grid, share)
        owner[first : first + math.prod(grid)] = made + absorbing_cell(grid, output)
        centres.append(first + cell_centres(grid, output))
        spans = [_spans(size, cells) for size, cells in zip(grid, output, strict=True)]
        frame, row, col = (_taps(*span, kernel) for span, kernel in zip(spans, (1, stride, stride), strict=True))
        frame, row, col = frame[:, :, None, None, None], row[None, :, None, :, None], col[None, None, :, None]
        taps.append(first + ((frame * grid[1] + row) * grid[2] + col).flatten(0, 2).flatten(1))
        widest = max(widest, math.prod(int(length.max()) for _, length in spans))
        made += math.prod(output)
    return Blocks(owner, torch.cat(centres), torch.cat(taps), widest)


def _spans(size: int, cells: int) -> tuple[Tensor, Tensor]:
    """First token and length of each of `cells` blocks along an axis of `size` tokens."""
    length = ((2 * torch.arange(size) + 1) * cells // (2 * size)).bincount(minlength=cells)
    return length.cumsum(0) - length, length


def _taps(first: Tensor, length: Tensor, kernel: int) -> Tensor:
    """[cells, kernel] the token nearest to the middle of each of a block's `kernel` equal parts."""
    return first[:, None] + (2 * torch.arange(kernel) + 1) * length[:, None] // (2 * kernel)
