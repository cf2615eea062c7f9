"""Uniform stride: keep tokens at even distances."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from vtc.method.base import Compressor, Selection, StageView
from vtc.method.registry import register
from vtc.ops.grid import Grid, split_budget, strided
from vtc.ops.host import put


@register
class Stride(Compressor):
    """Keep evenly spaced tokens of each item.

    Acts before the LLM, needs nothing. layout "grid" spreads the budget over rows and columns of the token raster (a
    video's frames and an image's tiles are stacked; thumbnail and stitched map of an AnyRes image share the budget in
    proportion to their sizes), "sequence" takes every N/k-th token of the flattened item, which drops whole columns
    when k divides the row length. Both are centred and keep the exact count. Items without full rasters are strided
    as a sequence.

    >>> import vtc
    >>> vtc.create("stride", layout="sequence")
    Stride(layout='sequence')
    """

    layout: Literal["grid", "sequence"] = "grid"

    name: ClassVar[str] = "stride"

    def select(self, view: StageView) -> Selection:
        items = view.items
        kept = torch.zeros_like(items.mask)
        shapes = [self._shape(layout.regions, n) for layout, n in zip(items.layouts, items.counts, strict=True)]
        wanted = list(zip(shapes, view.keep, strict=True))
        for regions, count in dict.fromkeys(wanted):
            rows = put([i for i, other in enumerate(wanted) if other == (regions, count)], kept.device)
            for first, (frames, height, width), share in split_budget(regions, count):
                places = first + strided(frames * height, width, share, device=kept.device)
                kept[rows[:, None], places] = kept.new_ones(())
        return Selection(kept, counts=view.keep)

    def _shape(self, regions: tuple[Grid, ...], count: int) -> tuple[Grid, ...]:
        if self.layout == "sequence" or count != sum(math.prod(region) for region in regions):
            return ((1, 1, count),)
        return regions
