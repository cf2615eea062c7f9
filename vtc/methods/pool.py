"""Adaptive average pooling on the token raster: the strong baseline that looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.compressor import Compressor, Selection, StageView
from vtc.errors import UnsupportedCall
from vtc.ops.grid import cell_centres, output_grid, pool_grid
from vtc.registry import register


@register
@dataclass(frozen=True)
class Pool(Compressor):
    """Average the LLM-side features of each item over a coarser raster.

    Acts before the LLM on projected features, needs nothing. The output raster is the one with at most the budgeted
    number of cells whose shape is closest to the input's, so a budget that is no product of two sides is undershot;
    the achieved count is in the statistics. A video is pooled frame by frame. A pooled token takes the place and
    position of the token at its cell's centre.
    """

    name: ClassVar[str] = "pool"

    def select(self, view: StageView) -> Selection:
        items, tokens = view.items, view.tokens
        keep, pooled = torch.zeros_like(items.mask), tokens.clone()
        into = torch.full_like(items.token, -1)
        counts = [0] * len(items)
        wanted = list(zip(items.layouts, view.keep, strict=True))
        for grid, count in {(layout.grid, count) for layout, count in wanted}:
            if grid is None:
                raise UnsupportedCall("pool needs items whose tokens form a full raster; choose another method here")
            frames, height, width = grid
            output = output_grid(height, width, max(1, count // frames))
            same = [i for i, (layout, other) in enumerate(wanted) if (layout.grid, other) == (grid, count)]
            rows = torch.tensor(same, device=tokens.device)[:, None]
            centres = cell_centres(grid, output, device=tokens.device)
            pooled[rows, centres] = pool_grid(tokens[rows[:, 0], : frames * height * width], grid, output)
            keep[rows, centres] = True
            into[rows, : frames * height * width] = _absorbed_by(grid, output, centres)
            for i in same:
                counts[i] = centres.numel()
        return Selection(keep, counts=counts, tokens=pooled, merged_into=into)


def _absorbed_by(grid: tuple[int, int, int], output: tuple[int, int], centres: torch.Tensor) -> torch.Tensor:
    """[t*h*w] raster index of the centre whose cell a token lies in (the first, where adaptive cells overlap)."""
    frames, height, width = grid
    device = centres.device
    row = torch.arange(height, device=device) * output[0] // height
    col = torch.arange(width, device=device) * output[1] // width
    frame = torch.arange(frames, device=device) * (output[0] * output[1])
    cell = frame[:, None, None] + row[:, None] * output[1] + col
    return centres[cell.flatten()]
