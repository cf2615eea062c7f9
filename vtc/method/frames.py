"""Items as videos: frame by frame, a picture being a video of one frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vtc.method.groups import Parts
from vtc.method.view import StageView
from vtc.ops.frames import earlier, places
from vtc.ops.host import put
from vtc.ops.select import in_groups


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of a view's items, G of each, the last ones empty where an item has fewer.

    parts: the I * G frames one behind the other. number: [I, N] frame of each token, 0 behind an item's end. most,
    width: frames of the longest item, that is G, and tokens of the largest frame; on the host.
    """

    view: StageView
    parts: Parts
    number: Tensor
    most: int
    width: int

    @staticmethod
    def of(view: StageView) -> Frames:
        """A video's crops are its frames; a picture is one frame, however many crops or tiles it has."""
        items, layouts = view.items, view.items.layouts
        whole = [layout.kind == "image" for layout in layouts]
        tiled = any(one and layout.n_crops > 1 for one, layout in zip(whole, layouts, strict=True))
        most = max((1 if one else layout.n_crops for one, layout in zip(whole, layouts, strict=True)), default=1)
        sizes = [(sum if one else max)(layout.crop_sizes) for one, layout in zip(whole, layouts, strict=True)]
        width = min(items.mask.shape[1], max(sizes, default=0))
        if most == 1 or not tiled:
            number = torch.zeros_like(items.token) if most == 1 else view.crop.clamp(min=0)
            return Frames(view, Parts.of(view, "item" if most == 1 else "crop"), number, most, width)
        number = torch.where(put(whole, view.device)[:, None], 0, view.crop.clamp(min=0))
        place, real = in_groups(number, most, width, items.mask)
        return Frames(view, Parts(real.flatten(0, 1), place.flatten(0, 1), items.mask), number, most, width)

    @cached_property
    def sizes(self) -> Tensor:
        """[I, G] tokens of each frame."""
        return self.parts.mask.view(len(self.number), self.most, -1).sum(2)

    @cached_property
    def place(self) -> Tensor:
        """[I, N] number of each token's place in its frame, the same in every frame of the item."""
        row, col = self.view.place
        return places(row, col, self.view.items.mask)

    def earlier(self, lag: Tensor) -> Tensor:
        """[I, N] index of the token at the same place `lag` [I, N] frames before, -1 where there is none."""
        return earlier(self.number, self.place, lag, self.view.items.mask, (self.most, self.width))

    def mean(self, values: Tensor) -> Tensor:
        """[R, W, ...] one value per token of the frames -> [R, ...] their mean, in float32; 0 of empty frames."""
        mask = self.parts.mask
        if self.parts.full:
            return values.sum(1, dtype=torch.float32) / max(1, mask.shape[1])
        real = mask.reshape(*mask.shape, *(1,) * (values.ndim - 2))
        return torch.where(real, values, 0).sum(1, dtype=torch.float32) / real.sum(1).clamp(min=1)
