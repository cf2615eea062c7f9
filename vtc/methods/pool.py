"""Adaptive average pooling on the token raster: the strong baseline that looks at nothing."""

from __future__ import annotations

from typing import ClassVar

import torch

from vtc.errors import UnsupportedCall
from vtc.method.base import Compressor, Selection, StageView
from vtc.method.registry import register
from vtc.ops.grid import absorbing_cell, cell_centres, output_raster, pool_grid, split_budget
from vtc.ops.host import put


@register
class Pool(Compressor):
    """Average the LLM-side features of each item over a coarser raster.

    Acts before the LLM on projected features, needs nothing. The output raster is the one with at most the budgeted
    number of cells whose shape is closest to the input's, so a budget that is no product of two sides is undershot;
    the achieved count is in the statistics. A video is pooled frame by frame, a tiled image tile by tile (frames or
    tiles are averaged too where there are more of them than tokens to keep). Thumbnail and stitched map of an
    AnyRes image are pooled separately and share the budget in proportion to their sizes; all newlines stay. A
    pooled token takes the place and position of the token at its cell's centre. On a model trained for it, this is
    what nested tokens do at inference (M3, arXiv:2405.17430, at 576, 144, 36, 9 and 1 tokens) and, but for pooling
    behind the projector, TokenFLEX (arXiv:2504.03154).

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("pool").plan(llava).positions
    'compact'
    """

    name: ClassVar[str] = "pool"
    version: ClassVar[int] = 2

    def select(self, view: StageView) -> Selection:
        items, tokens = view.items, view.tokens
        device = tokens.device
        kept, pooled = torch.zeros_like(items.mask), torch.empty_like(tokens)  # rows of tokens that go are not read
        into = torch.full_like(items.token, -1)
        counts = [0] * len(items)
        wanted = [(layout.regions, count) for layout, count in zip(items.layouts, view.keep, strict=True)]
        for shape in dict.fromkeys(wanted):
            regions, count = shape
            same = [i for i, other in enumerate(wanted) if other == shape]
            if not regions:
                raise UnsupportedCall("pool needs items whose tokens form full rasters; choose another method here")
            rows = put(same, device)[:, None]
            alike = tokens if len(same) == len(wanted) else tokens[rows[:, 0]]
            for first, grid, share in split_budget(regions, count):
                output = output_raster(grid, share)
                centres = first + cell_centres(grid, output, device)
                cells = absorbing_cell(grid, output, device)
                end = first + cells.numel()
                place = torch.arange(first, end, device=device)
                pooled[rows, centres] = pool_grid(alike[:, first:end], grid, output)
                kept[rows, centres] = kept.new_ones(())
                into[rows, place] = centres[cells]
                for i in same:
                    counts[i] += centres.numel()
        return Selection(kept, counts=counts, tokens=pooled, merged_into=into)
