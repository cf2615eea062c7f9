"""State of one forward call of the language model: which input token sits in which row, where, and how valid it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.batch.trace import CallRecord, CallStats, ItemRecord, StageStats
from vtc.batch.visuals import Visuals
from vtc.engine.cache import CompressedCache
from vtc.engine.deepstack import Deepstack
from vtc.errors import UnsupportedCall
from vtc.method.base import Positions, Selection, Stage
from vtc.method.readings import LLMReading
from vtc.ops.select import left_pack, take_last, take_rows

OWN_DEVICE = ("cache", "record", "memory")
"""What stays where it is: the cache's layers lie with the model's, the others are read by who moves what they hold."""


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and what holds some, on another device."""
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value


class Call:
    """One chunk on its way through the layers.

    source: [B, L] input position of each current row. valid: [B, L] bool or None when every row holds a token.
    logical: [..., B, L] the position ids the untouched model would use. row_counts: tokens per batch row, on the host.
    seen: [B, L] bool, rows that later layers may attend to, None for all of them; weights: [B, L] how much their keys
    count, None for one. memory: what the method carries from stage to stage.
    staged: a stage was reached, whether it dropped something or not, so that renumbering does not depend on what else
    is in the batch; pruned: something was dropped. adopted: the cache was a plain one before this call.
    """

    def __init__(
        self,
        logical: Tensor,
        valid: Tensor | None,
        positions: Positions,
        cache: CompressedCache | None,
        visuals: Visuals | None = None,
        trace: bool = False,
        adopted: bool = False,
    ) -> None:
        self.batch, self.length = logical.shape[-2:]
        self.device = logical.device
        self.logical, self.valid, self.policy, self.cache = logical, valid, positions, cache
        self.adopted = adopted
        self.items = visuals.items if visuals else None
        self.separators = visuals.separators if visuals else None
        self.row_counts = list(visuals.row_counts) if visuals else []
        self.visual: Tensor | None = visuals.visual if visuals else None
        self.prompt: Tensor | None = visuals.prompt if visuals else None
        self.text: Tensor | None = visuals.text if visuals else None
        self.text_count = visuals.text_count if visuals else 0
        self.seen: Tensor | None = None
        self.weights: Tensor | None = None
        self.losses: list[Tensor] = []
        self.memory: dict[Any, Any] = {}
        self.source = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        self.sources: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.llm_rows: dict[tuple[int, LLMReading], Tensor] = {}
        self.deepstack: Deepstack | None = None
        self.pruned = self.staged = False
        self.group = 0
        self.group_inputs: tuple[Any, Any] = (None, None)  # attention mask and rotary phases of the current group
        self.rotary: Any = None  # rotary phases of the rows that arrive at a stage inside the LLM
        self.groups: list[tuple[int, int, list[int]]] = []  # first layer, rows, visual tokens per batch row
        self.stages: list[StageStats] = []
        self.record = self._new_record() if trace and visuals else None
        self.first, self.last = self._ends()

    @property
    def rows(self) -> int:
        """Current sequence length, padding included."""
        return self.source.shape[1]

    def valid_rows(self) -> Tensor:
        """[B, L] bool, all True when every row holds a token."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.batch, self.rows, dtype=torch.bool, device=self.source.device)

    def to(self, device: torch.device) -> None:
        """Follow the hidden states of a split model to the next device."""
        if self.source.device == device:
            return
        for name, value in list(vars(self).items()):
            if name not in OWN_DEVICE:
                setattr(self, name, _moved(value, device))

    # --- pruning
    def apply(self, stage: Stage, selection: Selection, hidden: Tensor) -> Tensor:
        """Carry out a selection: replace rows, drop the others, pack what is left to the right. Returns [B, L', D]."""
        items, separators = self.items, self.separators
        assert items is not None and separators is not None
        assert self.visual is not None and self.prompt is not None and self.text is not None
        keep = selection.keep & items.mask
        counts, fixed, stay = self._counts(selection, keep)
        before, rows_before = sum(items.row_totals(self.batch)), self.rows
        if selection.tokens is not None:
            hidden = items.scatter(selection.tokens, hidden, where=keep)
        self._note_merge(stage, selection, keep)
        self._soften(stage, selection)
        self.losses += [] if selection.loss is None else [selection.loss]
        dropped = [a + b - c - d for a, b, c, d in zip(items.counts, items.fixed, counts, fixed, strict=True)]
        if any(dropped) or (selection.hide is None and selection.weights is None):
            rows = separators.scatter(stay, items.scatter(keep, self.valid_rows()))
            index, moved = self._pack(rows, items.rows, dropped)
            self.items = replace(items.kept(keep, counts, moved), fixed=fixed)
            self.separators = replace(separators.kept(stay, fixed, moved), fixed=fixed)
            self.source, self.logical = take_last(self.source, index), take_last(self.logical, index)
            self.visual, self.text = take_last(self.visual, index), take_last(self.text, index)
            self.prompt = take_last(self.prompt, index)
            self.seen = None if self.seen is None else take_last(self.seen, index)
            self.weights = None if self.weights is None else take_last(self.weights, index)
            self.llm_rows = {key: take_last(rows, index) for key, rows in self.llm_rows.items()}
            if self.deepstack is not None:
                self.deepstack = self.deepstack.take(index)
            hidden = take_rows(hidden, index)
            self.pruned = self.staged = True
        self.stages.append(StageStats(stage, rows_before, self.rows, before, before - sum(dropped)))
        self.note_stage(stage)
        return hidden

    def _counts(self, selection: Selection, keep: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Tokens and separators left of each item on the host, and [I, M] which separators stay."""
        assert self.items is not None and self.separators is not None
        mask = self.separators.mask
        if selection.separators is None:
            stay, fixed = mask, self.items.fixed
        elif selection.separators is False:
            stay, fixed = torch.zeros_like(mask), (0,) * len(self.items)
        else:
            stay, fixed = selection.separators & mask, None
        if selection.counts is not None and fixed is not None:
            return tuple(selection.counts), fixed, stay
        counted, left = torch.stack([keep.sum(1), stay.sum(1)]).tolist()
        return tuple(counted if selection.counts is None else selection.counts), tuple(left), stay

    def _soften(self, stage: Stage, selection: Selection) -> None:
        """Note hidden tokens and soft masks for the layers to come."""
        assert self.items is not None
        if selection.hide is not None:
            before = self.valid_rows() if self.seen is None else self.seen
            self.seen = before & ~self.items.scatter(selection.hide, torch.zeros_like(before))
        if selection.weights is None:
            return
        if stage == 0 or self.cache is not None:
            raise UnsupportedCall(
                f"soft masks at stage {stage} of a call {'without' if self.cache is None else 'with'} a cache; they "
                "are for training, inside the LLM and with use_cache=False"
            )
        rows = self.items.scatter(selection.weights, torch.ones_like(self.source, dtype=torch.float32))
        self.weights = rows if self.weights is None else self.weights * rows

    def _pack(self, keep: Tensor, rows: Sequence[int], dropped: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where every new row comes from, and where every old one went; drops each item's `dropped` tokens."""
        for row, count in zip(rows, dropped, strict=True):
            self.row_counts[row] -= count
        length = max(self.row_counts)
        index = left_pack(keep, length)
        slots = torch.arange(length, device=keep.device)
        moved = torch.zeros_like(keep, dtype=torch.long).scatter_(1, index, slots.expand(self.batch, -1))
        if all(count == length for count in self.row_counts):
            self.valid = None
        else:
            self.valid = slots >= length - torch.tensor(self.row_counts, device=keep.device)[:, None]
        return index, moved

    # --- positions and masks of a layer group
    def enter(self, group: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Begin the layers from `group` on: returns their position ids [..., B, L] and 2D mask [B, rows] or None."""
        self.group = group
        totals = self.items.row_totals(self.batch) if self.items is not None else []
        self.groups.append((group, self.rows, totals))
        self.sources[group] = (self.source, self.valid)
        positions = self._positions(group)
        mask = self.valid if self.seen is None else self.seen & self.valid_rows()
        if self.cache is None:
            return positions, mask
        return positions, self.cache.extend(group, mask, self.batch, self.rows, device)

    def _positions(self, group: int) -> Tensor:
        if self.policy == "preserve" or (self.policy == "compact_input" and group > 0):
            return self.logical
        numbers = self._renumbered(group)
        if self.policy == "compact_input":
            self.logical = numbers
        return numbers

    def _renumbered(self, group: int) -> Tensor:
        cache = self.cache
        shift = cache.shifts[group] if cache is not None else None
        shift = None if shift is None else shift.to(self.logical.device)
        if not self.staged:
            return self.logical if shift is None else self.logical - shift
        begin: Tensor | int = 0
        if cache is not None and cache.physical_length(group):
            begin = self.first if shift is None else self.first - shift
        numbers = (self.valid_rows().long().cumsum(1) - 1).clamp(min=0) + begin
        if cache is not None:
            cache.shifts[group] = self.last - numbers[:, -1:]
        return numbers.expand_as(self.logical).contiguous()

    def _ends(self) -> tuple[Tensor, Tensor]:
        """[B, 1] positions of each row's first and last token in the chunk, the outermost of multi-axis positions.

        Not the smallest and largest ones: some models place text behind a video in front of the video's last frames.
        """
        axes = self.logical if self.logical.ndim == 3 else self.logical[None]
        if self.valid is None:
            return axes[..., :1].amin(0), axes[..., -1:].amax(0)
        slots = torch.arange(self.length, device=self.device)
        first = torch.where(self.valid, slots, self.length - 1).amin(1, keepdim=True)
        last = torch.where(self.valid, slots, 0).amax(1, keepdim=True)
        return take_last(axes, first).amin(0), take_last(axes, last).amax(0)

    # --- notes
    def pass_through(self, stages: Sequence[Stage]) -> None:
        """Note that every token passed all `stages`."""
        assert self.items is not None
        self.groups.append((0, self.rows, self.items.row_totals(self.batch)))
        for stage in stages:
            self.note_stage(stage)

    def stats(self, layers: int, cache: Any, seconds: float) -> CallStats:
        """Numbers of this call on a model with `layers` LLM layers; cache: what the model returned."""
        assert self.items is not None
        ends = [start for start, _, _ in self.groups[1:]] + [layers]
        spans = [(end - start, rows, totals) for (start, rows, totals), end in zip(self.groups, ends, strict=True)]
        before = self.items.input_totals(self.batch)
        return CallStats(
            batch=self.batch,
            visual_tokens_in=tuple(before),
            visual_tokens_kept=tuple(sum(n * t[row] for n, _, t in spans) / layers for row in range(self.batch)),
            stages=tuple(self.stages),
            layer_rows=tuple(rows for n, rows, _ in spans for _ in range(n)),
            kv_rows=() if cache is None else tuple(layer.get_seq_length() for layer in cache.layers),
            seconds=seconds,
        )

    def note_eviction(self, stage: Stage, alive: Tensor) -> None:
        """Trace a stage after the prefill; alive: [B, S] over input positions."""
        if self.record is not None:
            self._trace(stage, alive)

    def _new_record(self) -> CallRecord:
        assert self.items is not None
        columns = zip(self.items.rows, self.items.layouts, self.items.positions, strict=True)
        items = [ItemRecord(row, positions[: each.n_tokens], each) for row, each, positions in columns]
        return CallRecord({}, items)

    def _note_merge(self, stage: Stage, selection: Selection, keep: Tensor) -> None:
        if self.record is None or selection.tokens is None:
            return
        assert self.items is not None
        token = self.items.token
        own = torch.where(keep, token, -1)
        target = selection.merged_into
        into = own if target is None else torch.where(target >= 0, token.gather(1, target.clamp(min=0)), own)
        for record, numbers, absorbed, count in zip(self.record.items, token, into, self.items.counts, strict=True):
            full = torch.full_like(record.positions, -1)
            record.merged_into[stage] = full.scatter(0, numbers[:count], absorbed[:count])

    def note_stage(self, stage: Stage) -> None:
        """Trace what is there after `stage`."""
        if self.record is None:
            return
        assert self.items is not None
        self._trace(stage, self.over_input(self.source, self.valid))

    def _trace(self, stage: Stage, alive: Tensor) -> None:
        assert self.record is not None
        self.record.keep[stage] = alive
        for item in self.record.items:
            item.kept[stage] = alive[item.row].gather(0, item.positions.to(alive.device)).nonzero().flatten()

    def over_input(self, source: Tensor, valid: Tensor | None) -> Tensor:
        """[B, S] bool over input positions that `source` [B, L] still holds."""
        held = torch.ones_like(source, dtype=torch.uint8) if valid is None else valid.to(torch.uint8)
        full = torch.zeros(self.batch, self.length, dtype=torch.uint8, device=source.device)
        # Padding slots point at dropped positions, so they add zero instead of writing.
        return full.scatter_add(1, source, held) > 0
