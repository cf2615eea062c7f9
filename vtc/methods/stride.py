"""Uniform stride: keep tokens at even distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtc.compressor import Compressor, Selection, StageView
from vtc.errors import VTCError, unknown_name
from vtc.ops.grid import strided
from vtc.registry import register

LAYOUTS = ("grid", "sequence")


@register
@dataclass(frozen=True)
class Stride(Compressor):
    """Keep evenly spaced tokens of each item.

    Acts before the LLM, needs nothing. layout "grid" spreads the budget over rows and columns of the token raster (a
    video's frames are stacked), "sequence" takes every N/k-th token of the flattened item, which drops whole columns
    when k divides the row length. Both are centred and keep the exact count. Items without a full raster are strided
    as a sequence.
    """

    layout: Literal["grid", "sequence"] = "grid"

    name: ClassVar[str] = "stride"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise VTCError(str(unknown_name("layout", self.layout, LAYOUTS)))

    def select(self, view: StageView) -> Selection:
        items = view.items
        keep = torch.zeros_like(items.mask)
        shapes = [self._shape(grid.grid, n) for grid, n in zip(items.layouts, items.counts, strict=True)]
        for shape in set(zip(shapes, view.keep, strict=True)):
            (height, width), count = shape
            same = [i for i, other in enumerate(zip(shapes, view.keep, strict=True)) if other == shape]
            chosen = strided(height, width, count, device=keep.device)
            keep[torch.tensor(same, device=keep.device)[:, None], chosen] = True
        return Selection(keep, counts=view.keep)

    def _shape(self, grid: tuple[int, int, int] | None, count: int) -> tuple[int, int]:
        if self.layout == "sequence" or grid is None or count != grid[0] * grid[1] * grid[2]:
            return 1, count
        return grid[0] * grid[1], grid[2]
