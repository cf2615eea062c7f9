"""What one image or video is to a method: its visual item.

An *item* is one image or one video as the user gave it. Its *tokens* are the rows that replace its placeholders in the
prompt, in prompt order. Adapters fill these values in; engine and methods read them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.ops.grid import Grid, frame_lines
from vtc.ops.host import put

Kind = Literal["image", "video"]


@dataclass(frozen=True, eq=False)
class VisualItem:
    """Geometry of one image or video with n tokens.

    crop, row, col: [n]; tile or frame id (-1 on newline tokens) and the place inside it, in encoder patches
    (fractional after pooling). newline: [n] bool, of which there are `newlines`; such separators are always kept, no
    method sees them, and they count against the budget. crop_grid: encoder patches (rows, columns) of one crop.
    grid: (frames, rows, columns) of tokens when they form a full raster, else None.
    thumbnail: crop id of the low-resolution overview, tiling: (rows, columns) of the other crops.
    regions: the full rasters that the tokens without the newlines are made of, one behind the other in token order
    (the thumbnail and the stitched map of an AnyRes image, say); just `grid` where there is one, () where some token
    lies in no raster. crop_sizes: tokens of each crop, on the host.
    """

    kind: Kind
    n_tokens: int
    crop: Tensor
    row: Tensor
    col: Tensor
    newline: Tensor
    n_crops: int
    crop_grid: tuple[int, int]
    newlines: int = 0
    grid: Grid | None = None
    thumbnail: int | None = None
    tiling: tuple[int, int] | None = None
    regions: tuple[Grid, ...] = ()
    crop_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.grid is not None and not self.regions:
            object.__setattr__(self, "regions", (self.grid,))
        if not self.crop_sizes:
            object.__setattr__(self, "crop_sizes", self._sizes())

    @property
    def selectable(self) -> int:
        """Tokens without the newlines, those that a method may drop.

        >>> import torch
        >>> places = torch.zeros(3)
        >>> VisualItem("image", 3, places, places, places, torch.tensor([False, False, True]), 1, (1, 2), 1).selectable
        2
        """
        return self.n_tokens - self.newlines

    @property
    def framed(self) -> bool:
        """Whether the crops are the frames of the rasters, one behind the other."""
        return sum(frames for frames, _, _ in self.regions) == self.n_crops and (
            sum(map(math.prod, self.regions)) == self.selectable
        )

    def _sizes(self) -> tuple[int, ...]:
        """From the rasters where every crop is one of their frames; otherwise counted, which reads the tensor."""
        real = self.selectable
        if self.n_crops == 1:
            return (real,)
        if self.framed:
            return tuple(height * width for frames, height, width in self.regions for _ in range(frames))
        return tuple(self.crop[self.crop >= 0].bincount(minlength=self.n_crops).tolist())


def item_lines(layouts: Sequence[VisualItem], device: torch.device) -> tuple[Tensor, ...]:
    """Row and column of every token in its frame, and rows and columns of the frame; four [I, N], of `framed` items.

    Tokens are numbered without the newlines; what lies behind an item's end is zero. Items of one shape share the work.

    >>> places, lines = torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    >>> item = VisualItem("image", 4, places, places, places, lines, 1, (2, 2), grid=(1, 2, 2))
    >>> [each.tolist() for each in item_lines([item], places.device)[:2]]
    [[[0, 0, 1, 1]], [[0, 1, 0, 1]]]
    """
    shapes = {regions: number for number, regions in enumerate(dict.fromkeys(item.regions for item in layouts))}
    known = [torch.stack(frame_lines(regions)) for regions in shapes]
    longest = max((each.shape[1] for each in known), default=0)
    table = torch.stack([torch.nn.functional.pad(each, (0, longest - each.shape[1])) for each in known])
    shape = put([shapes[item.regions] for item in layouts], device)
    return table.to(device, non_blocking=True)[shape].unbind(1)
