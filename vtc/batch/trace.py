"""What a run leaves behind: numbers per call (always) and kept positions per call (while tracing)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Selection, Stage
from vtc.method.items import ItemTable
from vtc.method.layout import Kind, VisualItem
from vtc.ops.grid import Grid

LAST_CALLS = 1000


@dataclass(frozen=True)
class StageStats:
    """Rows of the sequence (padding included) and visual tokens of the whole batch, before and after one stage."""

    stage: Stage
    rows_in: int
    rows_out: int
    visual_tokens_in: int
    visual_tokens_out: int


Spans = tuple[tuple[int, tuple[int, ...]], ...]
"""Numbers of neighbouring layers, and what each batch row has in them."""


@dataclass(frozen=True)
class CallStats:
    """One call that carried visual tokens.

    visual_tokens_in: tokens of each batch row. visual_tokens_kept: per batch row the mean over the LLM layers of the
    visual tokens that enter the layer, the figure a budget is about. layer_rows: sequence length entering each layer.
    kv_rows: rows each layer's cache holds after the call, empty without a cache. seconds: host time in the engine.
    entering: spans of neighbouring layers, and the visual tokens of each batch row that enter each of them; left: the
    same of those that stay in their caches. encoder_rows: (encoder layer, rows of each crop from there on, in the mean
    over crops of several sizes) where stages inside the vision encoder shortened it.
    """

    batch: int
    visual_tokens_in: tuple[int, ...]
    visual_tokens_kept: tuple[float, ...]
    stages: tuple[StageStats, ...]
    layer_rows: tuple[int, ...]
    kv_rows: tuple[int, ...]
    seconds: float
    entering: Spans = ()
    left: Spans = ()
    encoder_rows: tuple[tuple[int, float], ...] = ()

    @property
    def visual_entries_kept(self) -> tuple[float, ...]:
        """Per batch row the mean over the LLM layers of the visual entries that stay in a layer's KV cache.

        Of a call without a cache, those that a cache would hold if nothing were evicted; empty for encoders alone.
        """
        layers = sum(number for number, _ in self.left)
        rows = zip(*([number * tokens for tokens in totals] for number, totals in self.left), strict=True)
        return tuple(sum(row) / layers for row in rows)


@dataclass
class Stats:
    """Calls with visual tokens: sums over all, and the last of them one by one. Decode steps are in no number of these.

    calls: the last 1,000 of `count`, oldest first, so that a model that stays attached collects no more. other_calls:
    text-only calls and decode steps. visual_tokens_in: visual tokens before compression. visual_tokens_kept: those that
    entered an LLM layer, mean over the layers. visual_entries_kept: those that stayed in a layer's KV cache, mean over
    the layers. seconds: spent in the engine.
    """

    calls: deque[CallStats] = field(default_factory=lambda: deque(maxlen=LAST_CALLS))
    count: int = 0
    other_calls: int = 0
    visual_tokens_in: int = 0
    visual_tokens_kept: float = 0.0
    visual_entries_kept: float = 0.0
    seconds: float = 0.0

    def add(self, call: CallStats) -> None:
        """Count a call with visual tokens."""
        self.calls.append(call)
        self.count += 1
        self.visual_tokens_in += sum(call.visual_tokens_in)
        self.visual_tokens_kept += sum(call.visual_tokens_kept)
        self.visual_entries_kept += sum(call.visual_entries_kept)

    @property
    def retention(self) -> float:
        """Achieved fraction kept over all calls; 1.0 before the first."""
        return self.visual_tokens_kept / self.visual_tokens_in if self.visual_tokens_in else 1.0

    @property
    def cache_retention(self) -> float:
        """The share of the visual tokens whose KV entries stay, mean over the layers, over all calls; at first 1.0.

        What methods that act after the prefill are asked for: there every token enters every layer.
        """
        return self.visual_entries_kept / self.visual_tokens_in if self.visual_tokens_in else 1.0


@dataclass(frozen=True)
class ItemRecord:
    """One image or video of one call.

    row: batch row. positions: [n] its placeholders in the input. layout: crop, row and column of every token, newlines,
    rasters. passed: stage -> [n] bool, whether the token passed it; where KV heads keep sets of their own, whether it
    did in one of them. heads: stage -> [H, n] bool, those sets, only for such stages. merged_into: stage -> [n] token
    number that absorbed each token (its own if kept, -1 if dropped), only for stages that replaced rows. scores: stage
    -> [n] what the stage ranked the tokens by, NaN for those that it did not see; only for stages that tell. near:
    stage -> [n, C] as in `Selection.near`, NaN likewise; only for stages that limit what visual tokens see of each
    other.
    """

    row: int
    positions: Tensor
    layout: VisualItem
    passed: dict[Stage, Tensor] = field(default_factory=dict)
    heads: dict[Stage, Tensor] = field(default_factory=dict)
    merged_into: dict[Stage, Tensor] = field(default_factory=dict)
    scores: dict[Stage, Tensor] = field(default_factory=dict)
    near: dict[Stage, Tensor] = field(default_factory=dict)

    @property
    def kept(self) -> dict[Stage, Tensor]:
        """Stage -> [k] token numbers inside the item that passed it; the host waits for the device to count them."""
        return {stage: passed.nonzero().flatten() for stage, passed in self.passed.items()}

    @property
    def kind(self) -> Kind:
        """Image or video."""
        return self.layout.kind

    @property
    def grid(self) -> Grid | None:
        """(frames, rows, columns) of its tokens, None where they form several rasters or none."""
        return self.layout.grid

    def map(self, stage: Stage = 0) -> Tensor:
        """[frames, rows, columns] bool of the tokens that passed `stage`.

        Raises VTCError for an item of several rasters or none.
        """
        if self.grid is None:
            raise VTCError(
                f"the tokens of this {self.kind} form {len(self.layout.regions) or 'no'} full rasters and "
                f"{self.layout.newlines} newlines, not one raster; write `maps()`, or use `kept` and `layout`"
            )
        return self.maps(stage)[0]

    def maps(self, stage: Stage = 0) -> list[Tensor]:
        """[frames, rows, columns] bool of the tokens that passed `stage`, one tensor per entry of `layout.regions`.

        Of a tiled image these are its overview and the stitched map of its tiles, each of which shows the whole
        picture. Newlines are left out. Raises VTCError where some token lies in no raster.
        """
        sizes = [frames * rows * columns for frames, rows, columns in self.layout.regions]
        if sum(sizes) != self.layout.selectable:
            raise VTCError(
                f"some tokens of this {self.kind} lie in no raster, such as a class token; use `kept` and `layout`"
            )
        passed = self.passed[stage]
        marks = passed[~self.layout.newline.to(passed.device)]
        return [
            part.reshape(region) for part, region in zip(torch.split(marks, sizes), self.layout.regions, strict=True)
        ]


@dataclass(frozen=True)
class CallRecord:
    """Trace of one call that carried visual tokens.

    keep: stage -> [B, S] bool over input positions, True where the token is still there after the stage (text too;
    padding never), where KV heads keep sets of their own, in one of them. heads: stage -> [B, H, S], those sets.
    """

    keep: dict[Stage, Tensor]
    items: list[ItemRecord]
    heads: dict[Stage, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, items: ItemTable) -> CallRecord:
        """An empty record of a call's items as they came in."""
        columns = zip(items.rows, items.layouts, items.positions, strict=True)
        return cls({}, [ItemRecord(row, positions[: each.n_tokens], each) for row, each, positions in columns])

    def note(self, stage: Stage, alive: Tensor) -> None:
        """Keep what is there after `stage`; alive: [B, S] bool over input positions, or [B, H, S] of every KV head."""
        if alive.ndim == 3:
            self.heads[stage] = alive
            for item in self.items:
                item.heads[stage] = alive[item.row, :, item.positions.to(alive.device)]
            alive = alive.any(1)
        self.keep[stage] = alive
        for item in self.items:
            item.passed[stage] = alive[item.row].gather(0, item.positions.to(alive.device))

    def note_scores(self, stage: Stage, selection: Selection, items: ItemTable) -> None:
        """Keep what the view's `items` were ranked by, where the selection tells."""
        if selection.scores is None:
            return
        scores = selection.scores.detach().float()
        for record, numbers, values, count in zip(self.items, items.token, scores, items.counts, strict=True):
            unknown = torch.full(record.positions.shape, math.nan, device=values.device)
            record.scores[stage] = unknown.scatter(0, numbers[:count], values[:count])

    def note_near(self, stage: Stage, selection: Selection, items: ItemTable) -> None:
        """Keep which tokens of the view's `items` still see each other, where the selection limits it."""
        if selection.near is None:
            return
        for record, numbers, places, count in zip(self.items, items.token, selection.near, items.counts, strict=True):
            unknown = places.new_full((len(record.positions), places.shape[1]), math.nan, dtype=torch.float32)
            record.near[stage] = unknown.index_copy(0, numbers[:count], places[:count].float())

    def note_merge(self, stage: Stage, selection: Selection, items: ItemTable) -> None:
        """Keep which token absorbed which, where the selection replaces rows of the view's `items`."""
        if selection.tokens is None:
            return
        token, target = items.token, selection.merged_into
        own = torch.where(selection.keep & items.mask, token, -1)
        into = own if target is None else torch.where(target >= 0, token.gather(1, target.clamp(min=0)), own)
        for record, numbers, absorbed, count in zip(self.items, token, into, items.counts, strict=True):
            full = torch.full_like(record.positions, -1)
            record.merged_into[stage] = full.scatter(0, numbers[:count], absorbed[:count])
