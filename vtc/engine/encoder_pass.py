"""One call of the vision encoder: each crop is an item, and what its stages left of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtc.batch.rows import Batch, RowTable
from vtc.engine.passes import Pass
from vtc.method.base import EncoderStage, Selection
from vtc.method.items import ItemTable
from vtc.method.layout import VisualItem
from vtc.method.readings import VisionReading


@dataclass(eq=False)
class EncoderPass(Pass):
    """What one call of get_image_features or get_video_features gathered so far.

    readings: what each layer and reading recorded, one entry per attention call. patches: of each crop before the
    first stage. prefix: rows in front of them, such as a class token. left: what each stage that removed something
    left, its layer and [crops, M] the raster index of each patch (`patches` behind a crop's last one). shortened: its
    layer and the rows of each crop behind it.
    """

    readings: dict[tuple[int, VisionReading], list[Tensor]] = field(default_factory=dict)
    patches: int = 0
    prefix: int = 0
    left: list[tuple[int, Tensor]] = field(default_factory=list)
    shortened: tuple[tuple[int, int], ...] = ()

    def recorded(self, *, packed: bool) -> dict[tuple[int, VisionReading], Tensor]:
        """What was recorded so far; a packed encoder calls attention segment by segment, any other crop by crop."""
        return {pair: torch.cat(rows, dim=1 if packed else 0) for pair, rows in self.readings.items()}

    def enter(self, hidden: Tensor, prefix: int) -> None:
        """Begin with [crops, prefix + patches, D] rows, `prefix` of them no patches."""
        crops, length, _ = hidden.shape
        device, self.prefix, self.patches = hidden.device, prefix, length - prefix
        self.left, self.shortened = [], ()
        place = torch.arange(self.patches, device=device).expand(crops, -1)
        mask, number = torch.ones_like(place, dtype=torch.bool), torch.arange(crops, device=device)
        numbers, counts = tuple(range(crops)), (self.patches,) * crops
        table = ItemTable(
            row=number, index=prefix + place, token=place, mask=mask, source=number, positions=place, rows=numbers,
            sources=numbers, counts=counts, fixed=(0,) * crops, input_counts=counts, entered=counts,
            layouts=(_crop(self.patches, device),) * crops,
        )  # fmt: skip
        rows = RowTable(torch.arange(length, device=device).expand(crops, -1))
        self.batch = Batch(rows, length, table, table.split()[1], (length,) * crops)

    def drop_prefix(self, prefix: int) -> None:
        """Only `prefix` rows are in front of the patches now: some projectors never see the class token."""
        gone, self.prefix = self.prefix - prefix, prefix
        if not gone:
            return
        batch = self.now
        assert batch.items is not None
        index = torch.arange(gone, batch.width, device=batch.rows.source.device).expand(batch.size, -1)
        items = replace(batch.items, index=torch.where(batch.items.mask, batch.items.index - gone, 0))
        totals = tuple(total - gone for total in batch.totals)
        self.batch = replace(batch, rows=batch.rows.take(index), items=items, totals=totals)

    def apply(self, stage: EncoderStage, selection: Selection, hidden: Tensor) -> Tensor:
        """Carry out a selection on [crops, prefix + M, D] rows."""
        self.batch, hidden = self.now.apply(selection, hidden, "front")
        items = self.now.items
        assert items is not None
        self.shortened += ((stage.layer, self.now.width),)
        self.left.append((stage.layer, torch.where(items.mask, items.token, self.patches)))
        return hidden


def _crop(patches: int, device: torch.device) -> VisualItem:
    side = int(patches**0.5)
    square = side * side == patches
    place = torch.arange(patches, device=device)
    width = side if square else patches
    return VisualItem(
        kind="image",
        n_tokens=patches,
        crop=torch.zeros_like(place),
        row=(place // width).float(),
        col=(place % width).float(),
        newline=torch.zeros(patches, dtype=torch.bool, device=device),
        n_crops=1,
        crop_grid=(side, side) if square else (1, patches),
        grid=(1, side, side) if square else None,
    )
