"""A batch on its way through the layers, and the one place where tokens leave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vtc.method.items import ItemTable
from vtc.method.states import States
from vtc.method.view import Selection
from vtc.ops.host import put
from vtc.ops.select import front_pack, left_pack

Side = Literal["front", "left"]
"""Where padding goes: behind what is left, as in the vision encoder, or in front of it, as in the LLM."""


@dataclass(frozen=True, eq=False)
class RowTable:
    """What is known of each of the rows [B, L] of a sequence. Padding holds harmless values.

    source: input position. logical: [..., B, L] position ids that the untouched model would use. visual, prompt, text:
    bool, see `vtc.batch.prompt`. valid: bool, None where every row holds a token. seen: bool, rows that later layers
    may attend to, None for all of them. weights: how much their keys count there, None for one. near: [C + 1, B, L], a
    visual row attends to visual rows at most 1 away in each of these numbers and to itself, NaN for rows that are near
    none; None where it attends to all. extra: more of each row under any key, [..., B, L].
    """

    source: Tensor
    logical: Tensor | None = None
    visual: Tensor | None = None
    prompt: Tensor | None = None
    text: Tensor | None = None
    valid: Tensor | None = None
    seen: Tensor | None = None
    weights: Tensor | None = None
    near: Tensor | None = None
    extra: Mapping[Any, Tensor] = field(default_factory=dict)

    @property
    def held(self) -> Tensor:
        """[B, L] bool, `valid` also where it is None."""
        return torch.ones_like(self.source, dtype=torch.bool) if self.valid is None else self.valid

    def take(self, index: Tensor) -> RowTable:
        """The rows that `index` [B, L'] names."""
        return self._each(lambda values: values.gather(-1, index.expand(*values.shape[:-2], *index.shape)))

    def to(self, device: torch.device) -> RowTable:
        """The same rows on another device."""
        return self._each(lambda values: values.to(device))

    def note(self, key: Any, values: Tensor) -> RowTable:
        """With `values` [..., B, L] in `extra`."""
        return replace(self, extra={**self.extra, key: values})

    def _each(self, change: Callable[[Tensor], Tensor]) -> RowTable:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in given.items()}
        return RowTable(**changed, extra={key: change(value) for key, value in self.extra.items()})


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows and the visual items among them; None without any.

    length: rows at input. totals: valid rows of each batch row, text_count: most text of a batch row; on the host.
    """

    rows: RowTable
    length: int
    items: ItemTable | None = None
    separators: ItemTable | None = None
    totals: tuple[int, ...] = ()
    text_count: int = 0

    @property
    def size(self) -> int:
        """Batch rows."""
        return self.rows.source.shape[0]

    @property
    def width(self) -> int:
        """Current sequence length, padding included."""
        return self.rows.source.shape[1]

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens of each batch row now, separators included."""
        return [] if self.items is None else self.items.row_totals(self.size)

    def to(self, device: torch.device) -> Batch:
        """Follow the hidden states of a split model to the next device."""
        if self.rows.source.device == device:
            return self
        tables = {name: getattr(self, name) for name in ("items", "separators")}
        moved: dict[str, Any] = {name: None if table is None else table.to(device) for name, table in tables.items()}
        return replace(self, rows=self.rows.to(device), **moved)

    def apply(self, selection: Selection, states: States, side: Side) -> tuple[Batch, Tensor]:
        """Carry out a selection: drop rows of `states` [B, L, D], pack what is left to a side, and replace some of it.

        Synchronises only where the selection leaves its counts open.
        """
        items, separators = self.items, self.separators
        assert items is not None and separators is not None
        kept = selection.keep & items.mask
        counts, fixed, stay = _counts(selection, kept, items, separators)
        rows = self._masked(selection, items)
        dropped = [a + b - c - d for a, b, c, d in zip(items.counts, items.fixed, counts, fixed, strict=True)]
        if not any(dropped) and any(each is not None for each in (selection.hide, selection.weights, selection.near)):
            hidden = states.all()
            return replace(self, rows=rows), _replaced(selection, items, kept, hidden)
        alive = items.scatter(kept, rows.held)
        if any(items.fixed):
            alive = separators.scatter(stay, alive)
        totals = list(self.totals)
        for row, gone in zip(items.rows, dropped, strict=True):
            totals[row] -= gone
        index, valid = _pack(alive, totals, side)
        slots = torch.arange(index.shape[1], device=index.device)
        moved = torch.zeros_like(alive, dtype=torch.long).scatter_(1, index, slots.expand(self.size, -1))
        if any(items.fixed):
            separators = replace(separators.kept(stay, fixed, moved), fixed=fixed)
        packed = replace(
            self,
            rows=replace(rows.take(index), valid=valid),
            items=replace(items.kept(kept, counts, moved), fixed=fixed),
            separators=separators,
            totals=tuple(totals),
        )
        after = replace(items, index=moved[items.row[:, None], items.index])
        return packed, _replaced(selection, after, kept, states.take(index))

    def _masked(self, selection: Selection, items: ItemTable) -> RowTable:
        """The rows with what the selection says of the masks of the layers to come."""
        rows = self.rows
        if selection.hide is not None:
            before = rows.held if rows.seen is None else rows.seen
            rows = replace(rows, seen=before & ~items.scatter(selection.hide, torch.zeros_like(before)))
        if selection.weights is not None:
            soft = items.scatter(selection.weights, torch.ones_like(rows.source, dtype=torch.float32))
            rows = replace(rows, weights=soft if rows.weights is None else rows.weights * soft)
        if selection.near is not None:
            number = 2 * torch.arange(len(items), device=items.mask.device)[:, None, None]  # no two items are near
            places = torch.cat([number.expand(*items.mask.shape, 1), selection.near], dim=2).float()
            nowhere = places.new_full((*rows.source.shape, places.shape[2]), math.nan)
            rows = replace(rows, near=items.scatter(places, nowhere).movedim(2, 0))
        return rows

    def over_input(self, held: Tensor | None = None) -> Tensor:
        """[B, S, ...] bool over input positions that some row still holds.

        held: [B, L, ...] which rows count, all if None.
        """
        held = self.rows.held if held is None else held
        source = self.rows.source.reshape(self.size, self.width, *(1,) * (held.ndim - 2)).expand_as(held)
        full = held.new_zeros(self.size, self.length, *held.shape[2:], dtype=torch.uint8)
        # Padding slots point at dropped positions, so they add zero instead of writing.
        return full.scatter_add(1, source, held.to(torch.uint8)) > 0


def _replaced(selection: Selection, items: ItemTable, kept: Tensor, hidden: Tensor) -> Tensor:
    """`hidden` with the selection's own rows at the places of `items`."""
    return hidden if selection.tokens is None else items.scatter(selection.tokens, hidden, where=kept)


def _counts(
    selection: Selection, kept: Tensor, items: ItemTable, separators: ItemTable
) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """Tokens and separators left of each item on the host, and [I, M] which separators stay."""
    mask = separators.mask
    if selection.separators is None:
        stay, fixed = mask, items.fixed
    elif selection.separators is False:
        stay, fixed = torch.zeros_like(mask), (0,) * len(items)
    else:
        stay, fixed = selection.separators & mask, None
    if selection.counts is not None and fixed is not None:
        return tuple(selection.counts), fixed, stay
    counted, left = torch.stack([kept.sum(1), stay.sum(1)]).tolist()
    return tuple(counted if selection.counts is None else selection.counts), tuple(left), stay


def _pack(alive: Tensor, totals: Sequence[int], side: Side) -> tuple[Tensor, Tensor | None]:
    """[B, L'] where every new row comes from, and which of them hold a token, None for all.

    alive: [B, L] bool with `totals` set in each row.
    """
    length = max(totals)
    index = (left_pack if side == "left" else front_pack)(alive, length)
    if all(total == length for total in totals):
        return index, None
    slots = torch.arange(length, device=alive.device)
    ends = put(totals, alive.device)[:, None]
    return index, slots >= length - ends if side == "left" else slots < ends
