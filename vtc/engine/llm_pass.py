"""One forward pass of the language model: the batch on its way through the layers, and what is noted of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtc.batch.context import VisionContext
from vtc.batch.rows import Batch, RowTable
from vtc.batch.trace import CallRecord, CallStats, StageStats
from vtc.engine.cache import CompressedCache
from vtc.engine.passes import Pass
from vtc.errors import UnsupportedCall
from vtc.method.base import Positions, Selection, Stage
from vtc.method.states import States
from vtc.ops.select import put_rows, take_last

PLACE = "place"
"""Key in `RowTable.extra` of each row's place among all rows, while some of them skip a layer."""
GAINS = "gains"
"""The same of `Selection.gains` over the rows, 1 where nothing is said."""


@dataclass(eq=False)
class LLMPass(Pass):
    """What came in, and how far it is.

    outermost: the module the call began with. rows: see `vtc.engine.lookup`. labels: [B, S]. placeholders: [K, B, S],
    control: [B, S] bool, ids: [B, S] of the input. given: descriptions of encoder outputs that came with the call,
    contexts: of all its media. numbered: the caller numbers output rows as in its input. media: pixels went in and have
    not reached the language model yet. inside: the backbone is running.

    questions: what the caller says the prompts ask. texts: what pairs of encoders made of them, by pair.

    conducted: the engine changes what the layers see; otherwise the model runs untouched. policy: of positions. cache:
    None without one; adopted: it was a plain one before. features: see `vtc.engine.deepstack`. ends: [B, 1] positions
    of each row's first and last token at input, where something may be renumbered. staged: a stage was reached, whether
    it dropped something or not, so that renumbering does not depend on what else is in the batch; pruned: something was
    dropped. group: first layer of the current group of layers that hold the same rows; mask, rotary: what its layers
    take. left: the rows of each group so far, behind: those that leave its last layer. aside: while some rows skip a
    layer, all of them: batch, hidden rows as they go around it, rotary phases. spans: first layer, rows and visual
    tokens per batch row of each group. evicted: visual tokens per batch row that stay in the caches of groups that lost
    some. seconds: host time so far.
    """

    outermost: Any = None
    rows: Any = None
    labels: Tensor | None = None
    placeholders: Tensor | None = None
    control: Tensor | None = None
    ids: Tensor | None = None
    given: tuple[VisionContext, ...] = ()
    contexts: tuple[VisionContext, ...] = ()
    questions: tuple[str, ...] | None = None
    texts: dict[str | None, Tensor] = field(default_factory=dict)
    numbered: bool = False
    media: bool = False
    inside: bool = False
    conducted: bool = False
    policy: Positions = "preserve"
    cache: CompressedCache | None = None
    adopted: bool = False
    ends: tuple[Tensor, Tensor] | None = None
    features: tuple[Tensor, ...] = ()
    losses: list[Tensor] = field(default_factory=list)
    staged: bool = False
    pruned: bool = False
    group: int = 0
    mask: Any = None
    rotary: Any = None
    left: dict[int, RowTable] = field(default_factory=dict)
    behind: dict[int, RowTable] = field(default_factory=dict)
    aside: tuple[Batch, Tensor, Any] | None = None
    spans: list[tuple[int, int, list[int]]] = field(default_factory=list)
    evicted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    stages: list[StageStats] = field(default_factory=list)
    record: CallRecord | None = None
    seconds: float = 0.0

    # --- pruning
    def apply(self, stage: Stage, selection: Selection, states: States) -> Tensor:
        """Carry out a selection on the rows [B, L, D] and note what it did. Returns [B, L', D]."""
        if selection.weights is not None and (stage == 0 or self.cache is not None):
            raise UnsupportedCall(
                f"soft masks at stage {stage} of a call {'without' if self.cache is None else 'with'} a cache; they "
                "are for training, inside the LLM and with use_cache=False"
            )
        before = self.now
        assert before.items is not None
        if self.record is not None:
            self.record.note_merge(stage, selection, before.items)
            self.record.note_scores(stage, selection, before.items)
            self.record.note_near(stage, selection, before.items)
        self.losses += [] if selection.loss is None else [selection.loss]
        self.batch, hidden = after, hidden = before.apply(selection, states, "left")
        if after.items is not before.items:
            self.pruned = self.staged = True
        tokens = sum(before.visual_tokens), sum(after.visual_tokens)
        self.stages.append(StageStats(stage, before.width, after.width, *tokens))
        self.note(stage)
        return hidden

    def set_aside(self, stage: Stage, selection: Selection, states: States) -> Tensor:
        """As `apply`, for one layer: behind it `put_back` brings the rows back that are dropped here."""
        given = {"hidden tokens": selection.hide, "soft masks": selection.weights, "windows": selection.near}
        for what, values in given.items():
            if values is not None:
                raise UnsupportedCall(
                    f"{what} were given at stage {stage}, whose tokens skip one layer alone, while masks hold from a "
                    "layer on; give them at another stage"
                )
        full, hidden = self.now, states.all()
        assert full.items is not None
        places = torch.arange(full.width, device=hidden.device).expand(full.size, -1)
        rows = full.rows.note(PLACE, places)
        if selection.gains is not None:
            gains = full.items.scatter(selection.gains, torch.ones_like(places, dtype=torch.float32))
            rows, hidden = rows.note(GAINS, gains), hidden * gains[..., None].to(hidden)
        self.batch, self.aside = replace(full, rows=rows), (full, hidden, self.rotary)
        return self.apply(stage, selection, states)

    def weigh(self, added: Tensor) -> Tensor:
        """[B, L', D] what the MLP of a layer adds to the rows, times their gains there."""
        gains = self.now.rows.extra.get(GAINS)
        return added if gains is None else added * gains[..., None].to(added)

    def put_back(self, through: Tensor) -> Tensor:
        """[B, L', D] rows that went through a layer -> [B, L, D] with those that skipped it, as they were set aside.

        Of what was read in the layer, rows that skipped it have zeros.
        """
        assert self.aside is not None
        (full, hidden, self.rotary), self.aside = self.aside, None
        rows, full = self.now.to(through.device).rows, full.to(through.device)
        place = torch.where(rows.held, rows.extra[PLACE], full.width)
        for key, values in rows.extra.items():
            if key not in (PLACE, GAINS, *full.rows.extra):
                zeros = values.new_zeros(*values.shape[:-1], full.width + 1)
                read = zeros.scatter(-1, place.expand_as(values), values)[..., :-1]
                full = replace(full, rows=full.rows.note(key, read))
        self.batch, self.behind[self.group] = full, full.rows
        return put_rows(hidden.to(through), rows.extra[PLACE], rows.held, through)

    def enter_llm(self) -> None:
        """Note that the tokens there are now enter the first layer."""
        if (items := self.now.items) is not None:
            self.batch = replace(self.now, items=replace(items, entered=items.counts))

    def note(self, stage: Stage, alive: Tensor | None = None) -> None:
        """Trace what is there after `stage`; alive: see `CallRecord.note`, where it is not what is left."""
        if self.record is not None:
            self.record.note(stage, self.now.over_input() if alive is None else alive)

    # --- positions and masks of a layer group
    def enter(self, group: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Begin the layers from `group` on: returns their position ids [..., B, L] and 2D mask [B, rows] or None."""
        self.group = group
        self.note_group(group)
        self.left[group] = self.behind[group] = rows = self.now.rows
        positions = self._positions(group)
        mask = rows.valid if rows.seen is None else rows.seen & rows.held
        if self.cache is None:
            return positions, mask
        return positions, self.cache.extend(group, mask, self.now.size, self.now.width, device)

    def note_group(self, group: int) -> None:
        """Note what enters the layers from `group` on."""
        self.spans.append((group, self.now.width, self.now.visual_tokens))

    def _positions(self, group: int) -> Tensor:
        logical = self.now.rows.logical
        assert logical is not None
        if self.policy == "preserve" or (self.policy == "compact_input" and group > 0):
            return logical
        numbers = self._renumbered(group, logical)
        if self.policy == "compact_input":
            self.batch = replace(self.now, rows=replace(self.now.rows, logical=numbers))
        return numbers

    def _renumbered(self, group: int, logical: Tensor) -> Tensor:
        cache = self.cache
        shift = cache.shifts[group] if cache is not None else None
        shift = None if shift is None else shift.to(logical.device)
        if not self.staged:
            return logical if shift is None else logical - shift
        assert self.ends is not None
        first, last = (end.to(logical.device) for end in self.ends)
        begin: Tensor | int = 0
        if cache is not None and cache.physical_length(group):
            begin = first if shift is None else first - shift
        numbers = (self.now.rows.held.long().cumsum(1) - 1).clamp(min=0) + begin
        if cache is not None:
            cache.shifts[group] = last - numbers[:, -1:]
        return numbers.expand_as(logical).contiguous()

    # --- the end
    def finish(self) -> None:
        """The pass has returned."""
        if self.cache is not None:
            self.cache.end()

    def fail(self) -> None:
        """The pass has raised: its cache becomes what it was before, a plain one if it was that."""
        if self.cache is not None:
            self.cache.restore(plain=self.adopted)

    def interrupt(self) -> None:
        """The pass was left without a sign, by Ctrl-C or by detaching: its cache refuses to go on."""
        if self.cache is not None:
            self.cache.interrupt()

    def stats(self, layers: int, cache: Any) -> CallStats:
        """Numbers of this pass on a model with `layers` LLM layers; cache: what the model returned."""
        batch = self.now
        assert batch.items is not None
        ends = [start for start, _, _ in self.spans[1:]] + [layers]
        spans = [(end - start, rows, totals) for (start, rows, totals), end in zip(self.spans, ends, strict=True)]
        left = [self.evicted.get(start, tuple(totals)) for start, _, totals in self.spans]
        return CallStats(
            batch=batch.size,
            visual_tokens_in=tuple(batch.items.input_totals(batch.size)),
            visual_tokens_kept=tuple(sum(n * t[row] for n, _, t in spans) / layers for row in range(batch.size)),
            stages=tuple(self.stages),
            layer_rows=tuple(rows for n, rows, _ in spans for _ in range(n)),
            kv_rows=() if cache is None else tuple(layer.get_seq_length() for layer in cache.layers),
            seconds=self.seconds,
            entering=tuple((n, tuple(totals)) for n, _, totals in spans),
            left=tuple((n, totals) for (n, _, _), totals in zip(spans, left, strict=True)),
            encoder_rows=tuple(step for context in self.contexts for step in context.rows),
        )


def row_ends(rows: RowTable) -> tuple[Tensor, Tensor]:
    """[B, 1] positions of each row's first and last token, the outermost of multi-axis positions.

    Not the smallest and largest ones: some models place text behind a video in front of the video's last frames.
    """
    logical, valid = rows.logical, rows.valid
    assert logical is not None
    axes = logical if logical.ndim == 3 else logical[None]
    if valid is None:
        return axes[..., :1].amin(0), axes[..., -1:].amax(0)
    length = valid.shape[1]
    slots = torch.arange(length, device=valid.device)
    first = torch.where(valid, slots, length - 1).amin(1, keepdim=True)
    last = torch.where(valid, slots, 0).amax(1, keepdim=True)
    return take_last(axes, first).amin(0), take_last(axes, last).amax(0)
