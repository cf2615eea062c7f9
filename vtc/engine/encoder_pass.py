"""One call of the vision encoder: each crop is an item, and what its stages left of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.batch.trace import CallRecord, CallStats, StageStats
from vtc.engine.passes import Pass
from vtc.engine.seats import Seats
from vtc.method.base import EncoderStage, Selection
from vtc.method.layout import Kind
from vtc.method.readings import VisionReading


@dataclass(eq=False)
class EncoderPass(Pass):
    """What one call of the encoder gathered so far.

    kind: of what is encoded. packing: of an encoder that runs all items as one sequence, rows and columns of the tokens
    of each crop and their places in it. readings: what each layer and reading recorded, one entry per attention call.
    projected: what the projector made, one entry per call of it, where somebody asked.
    grid: rows and columns of the patches. seats: where these are, from the first stage on. shortened: layers of stages
    and the rows of each crop behind them. stages, seconds (on the host), record: for statistics and a trace. spans:
    first layer of every group of layers that hold the same rows, their width and the tokens of each crop in them.
    """

    kind: Kind = "image"
    packing: tuple[Sequence[tuple[int, int]], Tensor | None] | None = None
    readings: dict[tuple[int, VisionReading], list[Tensor]] = field(default_factory=dict)
    projected: list[Tensor] = field(default_factory=list)
    grid: tuple[int, int] | None = None
    seats: Seats | None = None
    shortened: tuple[tuple[int, float], ...] = ()
    stages: list[StageStats] = field(default_factory=list)
    spans: list[tuple[int, int, list[int]]] = field(default_factory=list)
    record: CallRecord | None = None
    tracing: bool = False
    seconds: float = 0.0

    def recorded(self, *, packed: bool) -> dict[tuple[int, VisionReading], Tensor]:
        """What was recorded so far; a packed encoder calls attention segment by segment, any other crop by crop."""
        return {pair: torch.cat(rows, dim=1 if packed else 0) for pair, rows in self.readings.items()}

    @property
    def pruned(self) -> bool:
        """A stage did something."""
        return self.seats is not None and bool(self.seats.left)

    def enter(self, seats: Seats) -> None:
        """Begin with these."""
        self.seats, self.shortened = seats, ()
        self.spans = [(0, self._width, self._tokens)]
        self.record = CallRecord.of(seats.parts[0].items) if self.tracing else None

    @property
    def _width(self) -> int:
        assert self.seats is not None
        return sum(part.batch.width for part in self.seats.parts)

    @property
    def _tokens(self) -> list[int]:
        assert self.seats is not None
        return [count for part in self.seats.parts for count in part.batch.visual_tokens]

    def apply(self, stage: EncoderStage, selections: Sequence[Selection | None], tokens: Sequence[Tensor]) -> Tensor:
        """Carry out the selection of every part on its rows of tokens; the rows of the encoder."""
        assert self.seats is not None
        width, before, parts = self._width, self._tokens, self.seats.parts
        tables = [part.items for part in parts]
        every = zip(parts, selections, tokens, strict=True)
        rows = self.seats.rows(
            stage.layer, [x if selection is None else part.apply(selection, x) for part, selection, x in every]
        )
        self.shortened += ((stage.layer, self.seats.mean_rows),)
        self.spans.append((stage.layer, self._width, self._tokens))
        self.stages.append(StageStats(stage, width, self._width, sum(before), sum(self._tokens)))
        if self.record is not None and (selection := selections[0]) is not None:
            self.record.note_scores(stage, selection, tables[0])
            if selection.merged_into is not None:
                self.record.note_merge(stage, selection, tables[0])
            self.record.note(stage, parts[0].batch.over_input()[:, -parts[0].tokens :])
        return rows

    def stats(self, layers: int) -> CallStats:
        """Numbers of this pass through all `layers` of an encoder."""
        assert self.seats is not None
        (part,) = self.seats.parts
        ends = [min(start, layers) for start, _, _ in self.spans[1:]] + [layers]
        spans = [(end - start, rows, tuple(n)) for (start, rows, n), end in zip(self.spans, ends, strict=True)]
        inside = [span for span in spans if span[0] > 0]
        return CallStats(
            batch=part.batch.size,
            visual_tokens_in=tuple(part.items.input_totals(part.batch.size)),
            visual_tokens_kept=tuple(map(float, part.batch.visual_tokens)),
            stages=tuple(self.stages),
            layer_rows=tuple(rows for count, rows, _ in inside for _ in range(count)),
            kv_rows=(),
            seconds=self.seconds,
            entering=tuple((count, tokens) for count, _, tokens in inside),
            encoder_rows=self.shortened,
        )
