"""The table of visual items in a batch: which row an item lies in, and where each of its tokens is right now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.method.layout import VisualItem
from vtc.ops.host import put
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

    @property
    def full(self) -> bool:
        """Whether every place of the table holds a token, so that `mask` is True everywhere; known on the host."""
        return all(count == self.mask.shape[1] for count in self.counts)

    @property
    def gaps(self) -> Tensor | None:
        """`mask` where it says anything, None where it is True everywhere."""
        return None if self.full else self.mask

    def to(self, device: torch.device) -> ItemTable:
        """The same table on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: value.to(device) for n, value in values.items() if isinstance(value, Tensor)}
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

    def take(self, rows: Tensor) -> Tensor:
        """[..., B, L] numbers of the current rows -> [..., I, N] those of the items' tokens."""
        rows = rows.index_select(-2, self.row)
        return rows.gather(-1, self.index.expand(*rows.shape[:-1], -1))

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
        flat.index_put_((place,), values.to(flat.dtype))
        return flat[:-1].reshape(background.shape)

    def kept(self, keep: Tensor, counts: Sequence[int], moved: Tensor) -> ItemTable:
        """The table after a stage: `keep` [I, N], its host counts, `moved` [B, L] new place of every old row."""
        return self._only(keep & self.mask, counts, moved)

    def _only(self, keep: Tensor, counts: Sequence[int], moved: Tensor | None = None) -> ItemTable:
        width = max(counts, default=0)
        order = front_pack(keep, width)
        mask = torch.arange(width, device=keep.device) < put(counts, keep.device)[:, None]
        index, token = self.index.gather(1, order), self.token.gather(1, order)
        index = index if moved is None else moved[self.row[:, None], index]
        return replace(
            self,
            index=torch.where(mask, index, 0),
            token=torch.where(mask, token, 0),
            mask=mask,
            counts=tuple(counts),
        )
