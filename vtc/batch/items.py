"""The table of visual items in a batch: which row an item lies in, and where each of its tokens is right now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.batch.context import VisionContext
from vtc.errors import UnsupportedCall
from vtc.method.layout import Kind, VisualItem
from vtc.ops.select import front_pack


@dataclass(frozen=True, eq=False)
class ItemTable:
    """I items side by side; N is the largest number of tokens one of them still has.

    row: [I] batch row. index: [I, N] place of each token in the current rows. token: [I, N] its number inside the item
    as encoded. mask: [I, N] False behind an item's end (index and token hold harmless values there).
    source: [I] entry of the encoder's output (several rows share one under beams). positions: [I, Nin] input
    position of all its tokens, separators included. rows, sources: row and source on the
    host. counts: selectable tokens now, fixed: separators still there, input_counts: tokens at input, all kinds,
    entered: selectable tokens that entered the LLM's first layer (before it: those of now); on the host. layouts:
    geometry of each item.
    """

    row: Tensor
    index: Tensor
    token: Tensor
    mask: Tensor
    source: Tensor
    positions: Tensor
    rows: tuple[int, ...]
    sources: tuple[int, ...]
    counts: tuple[int, ...]
    fixed: tuple[int, ...]
    input_counts: tuple[int, ...]
    entered: tuple[int, ...]
    layouts: tuple[VisualItem, ...]

    def __len__(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device) -> ItemTable:
        """The same table on another device."""
        moved = {
            name: getattr(self, name).to(device) for name in ("row", "index", "token", "mask", "source", "positions")
        }
        return replace(self, **moved)

    def row_totals(self, batch: int) -> list[int]:
        """Visual tokens of each of `batch` rows, separators included, on the host."""
        totals = [0] * batch
        for row, count, fixed in zip(self.rows, self.counts, self.fixed, strict=True):
            totals[row] += count + fixed
        return totals

    def input_totals(self, batch: int) -> list[int]:
        """Visual tokens of each of `batch` rows at input, on the host."""
        totals = [0] * batch
        for row, count in zip(self.rows, self.input_counts, strict=True):
            totals[row] += count
        return totals

    def geometry(self, name: Literal["crop", "row", "col"]) -> Tensor:
        """[I, N] crop id, row or column of every token, as in `VisualItem`; -1 behind an item's end."""
        values = pad_sequence([getattr(item, name) for item in self.layouts], batch_first=True)
        return torch.where(self.mask, values.to(self.token.device).gather(1, self.token), -1)

    def split(self) -> tuple[ItemTable, ItemTable]:
        """The tables of the tokens alone and of the separators alone."""
        if not any(self.fixed):
            return self, self._only(torch.zeros_like(self.mask), self.fixed)
        width = self.mask.shape[1]
        pad = torch.nn.functional.pad
        newline = torch.stack(
            [pad(item.newline.to(self.mask.device), (0, width - item.n_tokens)) for item in self.layouts]
        )
        return self._only(self.mask & ~newline, self.counts), self._only(self.mask & newline, self.fixed)

    def scatter(self, values: Tensor, background: Tensor, where: Tensor | None = None) -> Tensor:
        """Write per-token `values` [I, N, ...] over `background` [B, L, ...] at the tokens' places.

        where: [I, N] bool limits the writing to some of the tokens.
        """
        batch, length = background.shape[:2]
        written = self.mask if where is None else self.mask & where
        # Everything else goes to one spare row that is cut off again, so no mask has to be resolved on the host.
        place = torch.where(written, self.row[:, None] * length + self.index, batch * length)
        flat = torch.cat([background.flatten(0, 1), background.new_zeros(1, *background.shape[2:])])
        flat = flat.index_put((place,), values.to(flat.dtype))
        return flat[:-1].reshape(background.shape)

    def kept(self, keep: Tensor, counts: Sequence[int], moved: Tensor) -> ItemTable:
        """The table after a stage: `keep` [I, N], its host counts, `moved` [B, L] new place of every old row."""
        return self._only(keep & self.mask, counts, moved)

    def _only(self, keep: Tensor, counts: Sequence[int], moved: Tensor | None = None) -> ItemTable:
        width = max(counts, default=0)
        order = front_pack(keep, width)
        mask = torch.arange(width, device=keep.device) < torch.tensor(counts, device=keep.device)[:, None]
        index, token = self.index.gather(1, order), self.token.gather(1, order)
        index = index if moved is None else moved[self.row[:, None], index]
        return replace(
            self,
            index=torch.where(mask, index, 0),
            token=torch.where(mask, token, 0),
            mask=mask,
            counts=tuple(counts),
        )


@dataclass(frozen=True, eq=False)
class _Entry:
    """One item at its place: batch row, kind number, first placeholder of that kind in the row, encoder entry."""

    row: int
    kind: int
    offset: int
    source: int
    layout: VisualItem


def build(
    placeholders: Tensor, counts: Sequence[int], contexts: Sequence[VisionContext], kinds: dict[Kind, int]
) -> tuple[ItemTable, ItemTable]:
    """Assign the encoded items of all `contexts` to the placeholders of a batch: their tokens, and their separators.

    placeholders: [K, B, S] bool, one mask per kind in the order of `kinds`. counts: their [K * B] sums on the host.
    Items fill the rows in order; under beams or num_return_sequences each item serves several neighbouring rows.
    Raises UnsupportedCall when placeholders and encoded tokens do not line up.
    """
    batch = placeholders.shape[1]
    entries: list[_Entry] = []
    source = 0
    for context in contexts:
        kind = kinds[context.kind]
        per_row = list(counts[kind * batch : (kind + 1) * batch])
        entries += _assign(context, kind, per_row, source)
        source += len(context.items)
    for name, kind in kinds.items():
        if sum(counts[kind * batch : (kind + 1) * batch]) and not any(c.kind == name for c in contexts):
            raise UnsupportedCall(
                f"the prompt holds {name} placeholders but no {name} was encoded; pass its pixels too"
            )
    entries.sort(key=lambda entry: (entry.row, entry.kind, entry.offset))
    device = placeholders.device
    sizes = tuple(entry.layout.n_tokens for entry in entries)
    numbers = [(e.kind, e.row, e.offset, e.layout.n_tokens, e.source) for e in entries]
    kind_of, row, offset, size, source_of = torch.tensor(numbers, device=device).unbind(1)
    steps = torch.arange(max(sizes), device=device)
    mask = steps < size[:, None]
    order = (~placeholders).to(torch.uint8).argsort(dim=2, stable=True)  # placeholder positions first, in order
    rank = torch.where(mask, offset[:, None] + steps, 0)
    index = order[kind_of[:, None], row[:, None], rank]
    fixed = tuple(entry.layout.newlines for entry in entries)
    table = ItemTable(
        row=row,
        index=torch.where(mask, index, 0),
        token=torch.where(mask, steps, 0),
        mask=mask,
        source=source_of,
        positions=torch.where(mask, index, 0),
        rows=tuple(entry.row for entry in entries),
        sources=tuple(entry.source for entry in entries),
        counts=(real := tuple(size - newlines for size, newlines in zip(sizes, fixed, strict=True))),
        fixed=fixed,
        input_counts=sizes,
        entered=real,
        layouts=tuple(entry.layout for entry in entries),
    )
    return table.split()


def _assign(context: VisionContext, kind: int, per_row: list[int], source: int) -> list[_Entry]:
    placeholders, total = sum(per_row), context.total
    if total == 0 or placeholders % total:
        raise UnsupportedCall(
            f"{placeholders} {context.kind} placeholders cannot be matched to {total} encoded tokens; compression "
            "needs the whole prompt with all its pixels in one call (chunked prefill is not supported)"
        )
    expand = placeholders // total
    entries: list[_Entry] = []
    item = 0
    for first in range(0, len(per_row), expand):
        group = per_row[first : first + expand]
        if len(set(group)) != 1:
            raise UnsupportedCall(
                f"rows {first} to {first + expand - 1} share encoded items but hold {group} placeholders; repeat every "
                "prompt unchanged, or pass the pixels of each row"
            )
        offset = 0
        while offset < group[0]:
            layout = context.items[item]
            if offset + layout.n_tokens > group[0]:
                raise UnsupportedCall(
                    f"row {first} holds {group[0]} {context.kind} placeholders, which ends inside an item of "
                    f"{layout.n_tokens} tokens; prompts and pixels must come in the same order"
                )
            entries += [_Entry(row, kind, offset, source + item, layout) for row in range(first, first + len(group))]
            offset += layout.n_tokens
            item += 1
    return entries
