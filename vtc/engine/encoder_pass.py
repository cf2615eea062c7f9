"""One call of the vision encoder: each crop is an item, and what its stages left of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtc.batch.rows import Batch, RowTable
from vtc.batch.trace import CallRecord, CallStats, StageStats
from vtc.engine.passes import Pass
from vtc.errors import UnsupportedMethod
from vtc.method.base import EncoderStage, Selection
from vtc.method.items import ItemTable
from vtc.method.layout import VisualItem
from vtc.method.readings import VisionReading
from vtc.method.states import States

SIZES = "sizes"
"""Key of what the rows count for as keys, among the extra columns of the batch."""


@dataclass(eq=False)
class EncoderPass(Pass):
    """What one call of the encoder gathered so far.

    readings: what each layer and reading recorded, one entry per attention call. patches: of each crop before the
    first stage. prefix: rows in front of them, such as a class token. grid: rows and columns of the patches. left: what
    each stage that changed their number left, its layer and [crops, M] the raster index of each patch (`patches` behind
    a crop's last one). shortened: its layer and the rows of each crop behind it. stages, seconds (on the host), record:
    for statistics and a trace. spans: first layer of every group of layers that hold the same rows, their width and the
    patches of each crop in them.
    """

    readings: dict[tuple[int, VisionReading], list[Tensor]] = field(default_factory=dict)
    patches: int = 0
    prefix: int = 0
    grid: tuple[int, int] | None = None
    left: list[tuple[int, Tensor]] = field(default_factory=list)
    shortened: tuple[tuple[int, int], ...] = ()
    stages: list[StageStats] = field(default_factory=list)
    spans: list[tuple[int, int, list[int]]] = field(default_factory=list)
    record: CallRecord | None = None
    tracing: bool = False
    seconds: float = 0.0

    def recorded(self, *, packed: bool) -> dict[tuple[int, VisionReading], Tensor]:
        """What was recorded so far; a packed encoder calls attention segment by segment, any other crop by crop."""
        return {pair: torch.cat(rows, dim=1 if packed else 0) for pair, rows in self.readings.items()}

    def enter(self, hidden: Tensor, prefix: int) -> None:
        """Begin with [crops, prefix + patches, D] rows, `prefix` of them no patches."""
        self.prefix, self.patches = prefix, hidden.shape[1] - prefix
        self.left, self.shortened = [], ()
        self.batch = batch = self._whole(hidden)
        self.spans = [(0, batch.width, self.now.visual_tokens)]
        self.record = CallRecord.of(batch.items) if self.tracing and batch.items is not None else None

    def _whole(self, hidden: Tensor) -> Batch:
        """All patches of every crop, behind the rows in front of them."""
        crops, device = hidden.shape[0], hidden.device
        length, prefix = self.prefix + self.patches, self.prefix
        place = torch.arange(self.patches, device=device).expand(crops, -1)
        mask, number = torch.ones_like(place, dtype=torch.bool), torch.arange(crops, device=device)
        numbers, counts = tuple(range(crops)), (self.patches,) * crops
        table = ItemTable(
            row=number, index=prefix + place, token=place, mask=mask, source=number, positions=place, rows=numbers,
            sources=numbers, counts=counts, fixed=(0,) * crops, input_counts=counts, entered=counts,
            layouts=(_crop(self.patches, self.grid, device),) * crops,
        )  # fmt: skip
        rows = RowTable(torch.arange(length, device=device).expand(crops, -1))
        return Batch(rows, length, table, table.split()[1], (length,) * crops)

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
        before, table = self.now, self.now.items
        assert table is not None
        if selection.sizes is not None:
            sizes = table.scatter(selection.sizes, torch.ones_like(before.rows.source, dtype=torch.float32))
            before = replace(before, rows=before.rows.note(SIZES, sizes))
        if selection.restored is not None:
            if selection.restored.shape[1] != self.patches:
                raise UnsupportedMethod(
                    f"Selection.restored has {selection.restored.shape[1]} rows, the encoder was given {self.patches} "
                    "patches; give a row for each of them"
                )
            hidden = torch.cat([hidden[:, : self.prefix], selection.restored.to(hidden.dtype)], dim=1)
            self.batch = self._whole(hidden)
        else:
            self.batch, hidden = before.apply(selection, States(hidden), "front")
        items, width, tokens = self.now.items, self.now.width, self.now.visual_tokens
        assert items is not None
        self.shortened += ((stage.layer, width),)
        self.left.append((stage.layer, torch.where(items.mask, items.token, self.patches)))
        self.spans.append((stage.layer, width, tokens))
        self.stages.append(StageStats(stage, before.width, width, sum(before.visual_tokens), sum(tokens)))
        if self.record is not None:
            self.record.note_scores(stage, selection, table)
            if selection.merged_into is not None:
                self.record.note_merge(stage, selection, table)
            self.record.note(stage, self.now.over_input()[:, -self.patches :])
        return hidden

    def stats(self, layers: int) -> CallStats:
        """Numbers of this pass through all `layers` of an encoder."""
        batch = self.now
        assert batch.items is not None
        ends = [min(start, layers) for start, _, _ in self.spans[1:]] + [layers]
        spans = [(end - start, rows, tuple(n)) for (start, rows, n), end in zip(self.spans, ends, strict=True)]
        inside = [span for span in spans if span[0] > 0]
        return CallStats(
            batch=batch.size,
            visual_tokens_in=tuple(batch.items.input_totals(batch.size)),
            visual_tokens_kept=tuple(map(float, batch.visual_tokens)),
            stages=tuple(self.stages),
            layer_rows=tuple(rows for count, rows, _ in inside for _ in range(count)),
            kv_rows=(),
            seconds=self.seconds,
            entering=tuple((count, tokens) for count, _, tokens in inside),
            encoder_rows=self.shortened,
        )


def _crop(patches: int, grid: tuple[int, int] | None, device: torch.device) -> VisualItem:
    if grid is None or grid[0] * grid[1] != patches:
        side = int(patches**0.5)
        grid = (side, side) if side * side == patches else None
    place = torch.arange(patches, device=device)
    height, width = grid or (1, patches)
    return VisualItem(
        kind="image",
        n_tokens=patches,
        crop=torch.zeros_like(place),
        row=(place // width).float(),
        col=(place % width).float(),
        newline=torch.zeros(patches, dtype=torch.bool, device=device),
        n_crops=1,
        crop_grid=(height, width),
        grid=None if grid is None else (1, height, width),
    )
