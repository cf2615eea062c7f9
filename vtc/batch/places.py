"""Where the tokens of an image or a video lie on its pixels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.layout import VisualItem
from vtc.ops.host import put


@dataclass(frozen=True, eq=False)
class Places:
    """The pixels that each of n tokens was made of.

    panels: the whole picture as often as tokens cover it, or one per group of frames. panel: [n] int64, number of the
    panel that a token lies on; -1 for newlines and class tokens, which lie on none. box: [n, 4] left, top, right and
    bottom as fractions of the panel's width and height; NaN for those.
    """

    panels: tuple[str, ...]
    panel: Tensor
    box: Tensor

    def raster(self, panel: int) -> Tensor:
        """[rows, columns] number of the token at each place of a panel, -1 where none lies."""
        tokens = (self.panel == panel).nonzero().flatten()
        boxes = self.box[tokens]
        size = 1 / (boxes[0, 2:] - boxes[0, :2])
        column, row = (boxes[:, :2] * size).round().long().unbind(1)
        columns, rows = size.round().long().tolist()
        found = torch.full((rows, columns), -1, device=tokens.device)
        found[row, column] = tokens
        return found


def places(layout: VisualItem) -> Places:
    """Panels and boxes of an item's tokens, in token order.

    Fractions refer to what the processor shows of the picture: all of it, but for those that cut out its centre. Merged
    and pooled tokens have the box of all their patches, and margins that were added to a picture take no part.

    Raises:
        VTCError: the picture was cut into tiles of which nobody knows rows and columns.
    """
    real = ~layout.newline
    panel = torch.full((layout.n_tokens,), -1, device=real.device)
    box = torch.full((layout.n_tokens, 4), torch.nan, device=real.device)
    if not layout.regions:  # a class token among the patches
        inside = real & (layout.row >= 0)
        rows, columns = layout.crop_grid
        corner = torch.stack([layout.col / columns, layout.row / rows], 1)
        size = put([1 / columns, 1 / rows], real.device)
        panel[inside], box[inside] = 0, torch.cat([corner, corner + size], 1)[inside]
        return Places(("picture",), panel, box)
    panels, parts = _regions(layout)
    panel[real] = torch.cat([number for number, _ in parts]).to(real.device)
    box[real] = torch.cat([boxes for _, boxes in parts]).to(real.device)
    return Places(panels, panel, box)


def _regions(layout: VisualItem) -> tuple[tuple[str, ...], list[tuple[Tensor, Tensor]]]:
    """Names of the panels; panel and box of the tokens of each region, or of each tile."""
    frames, rows, columns = layout.regions[0]
    cell = _raster(rows, columns)
    if layout.kind == "video":
        names = tuple(f"frame {number + 1}" for number in range(frames))
        return names, [(torch.full((len(cell),), number), cell) for number in range(frames)]
    if len(layout.regions) > 1:  # every region shows the whole picture
        parts = [
            (torch.full((height * width,), number), _raster(height, width))
            for number, (_, height, width) in enumerate(layout.regions)
        ]
        return ("overview", "tiles")[: len(parts)], parts
    if frames == 1:
        return ("picture",), [(torch.zeros(len(cell), dtype=torch.long), cell)]
    if layout.tiling is None:
        raise VTCError(
            f"this picture was cut into {frames} tiles of unknown rows and columns, so that its tokens have no known "
            "place; pass processor= and image_sizes= to vtc.compress"
        )
    down, across = layout.tiling
    scale = torch.tensor([across, down, across, down])
    tiles = itertools.product(range(down), range(across))
    cut = [(torch.ones(len(cell), dtype=torch.long), (cell + torch.tensor([c, r, c, r])) / scale) for r, c in tiles]
    return ("overview", "tiles"), [*cut, (torch.zeros(len(cell), dtype=torch.long), cell)]  # the overview comes last


def _raster(rows: int, columns: int) -> Tensor:
    """[rows * columns, 4] boxes of a raster, row by row."""
    top, left = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
    return torch.stack([left, top, left + 1 / columns, top + 1 / rows], -1).view(-1, 4)
