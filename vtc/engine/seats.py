"""Where the patches of one encoder call lie in its rows: a batch of crops, or one packed sequence of them all.

A method at an encoder stage sees tokens. A token is one patch, or the square of patches that becomes one token of the
LLM, side by side in one wide row; methods never learn which. Here tokens are made of rows and rows of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtc.batch.rows import Batch, RowTable
from vtc.errors import UnsupportedMethod
from vtc.method.base import Selection
from vtc.method.items import ItemTable
from vtc.method.layout import VisualItem
from vtc.method.states import States

SIZES = "sizes"
"""Key of what the rows count for as keys, among the extra columns of a batch."""
Raster = tuple[int, int]


@dataclass(eq=False)
class Part:
    """Crops of one raster, each an item, and what is left of them. tokens: of each crop before the first stage.

    prefix: rows in front of the tokens, such as a class token. memory: of the method.
    """

    batch: Batch
    tokens: int
    prefix: int
    memory: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def whole(cls, crops: int, tokens: int, raster: Raster | None, prefix: int, device: torch.device) -> Part:
        """All tokens of every crop, behind the rows in front of them; raster: None where there is none."""
        place = torch.arange(tokens, device=device).expand(crops, -1)
        mask, number = torch.ones_like(place, dtype=torch.bool), torch.arange(crops, device=device)
        numbers, counts, length = tuple(range(crops)), (tokens,) * crops, prefix + tokens
        table = ItemTable(
            row=number, index=prefix + place, token=place, mask=mask, source=number, positions=place, rows=numbers,
            sources=numbers, counts=counts, fixed=(0,) * crops, input_counts=counts, entered=counts,
            layouts=(_crop(tokens, raster, device),) * crops,
        )  # fmt: skip
        rows = RowTable(torch.arange(length, device=device).expand(crops, -1))
        return cls(Batch(rows, length, table, table.split()[1], (length,) * crops), tokens, prefix)

    @property
    def items(self) -> ItemTable:
        """The table of its crops."""
        assert self.batch.items is not None
        return self.batch.items

    def drop_prefix(self, prefix: int) -> None:
        """Only `prefix` rows are in front of the tokens now: some projectors never see the class token."""
        gone, self.prefix = self.prefix - prefix, prefix
        if not gone:
            return
        batch, items = self.batch, self.items
        index = torch.arange(gone, batch.width, device=batch.rows.source.device).expand(batch.size, -1)
        items = replace(items, index=torch.where(items.mask, items.index - gone, 0))
        totals = tuple(total - gone for total in batch.totals)
        self.batch = replace(batch, rows=batch.rows.take(index), items=items, totals=totals)

    def apply(self, selection: Selection, rows: Tensor) -> Tensor:
        """Carry out a selection on [crops, prefix + N, D] rows of tokens."""
        before, items = self.batch, self.items
        if selection.restored is not None:
            if selection.restored.shape[1] != self.tokens:
                raise UnsupportedMethod(
                    f"Selection.restored has {selection.restored.shape[1]} rows, the encoder was given {self.tokens} "
                    "patches; give a row for each of them"
                )
            grid = items.layouts[0].grid
            raster = None if grid is None else grid[1:]
            self.batch = Part.whole(len(items), self.tokens, raster, self.prefix, rows.device).batch
            return torch.cat([rows[:, : self.prefix], selection.restored.to(rows.dtype)], dim=1)
        if selection.sizes is not None:
            sizes = items.scatter(selection.sizes, torch.ones_like(before.rows.source, dtype=torch.float32))
            before = replace(before, rows=before.rows.note(SIZES, sizes))
        self.batch, rows = before.apply(selection, States(rows), "front")
        return rows


class Seats(ABC):
    """Where the patches of a call are, and how tokens are made of them.

    parts: the crops, those of one raster together. patches: rows for patches in each sequence of the encoder's before
    the first stage. size: patches in a token. left: what each stage left, its layer and the original place of every
    row for a patch, `patches` where there is none.
    """

    parts: Sequence[Part]
    patches: int
    size: int
    left: list[tuple[int, Tensor]]

    @abstractmethod
    def tokens(self, hidden: Tensor) -> list[Tensor]:
        """Rows of the encoder as they are now -> [crops, prefix + N, size * D] rows of each part's tokens."""

    @abstractmethod
    def rows(self, layer: int, tokens: Sequence[Tensor]) -> Tensor:
        """The rows of the encoder made of what a stage in front of `layer` left of the tokens; noted in `left`."""

    @abstractmethod
    def spread(self, values: Tensor, places: Tensor) -> Tensor:
        """Values of the rows at `places` (an entry of `left`), put where the patches were, zeros where none is left.

        Rows in front of the patches pass.
        """

    @abstractmethod
    def members(self, values: Tensor, part: Part) -> Tensor:
        """Values of all patches where they were -> [crops, N, size, ...] of a part's tokens as there were at first."""

    @abstractmethod
    def lead(self, values: Tensor, part: Part) -> Tensor:
        """The same of the rows in front of the patches, [crops, prefix, ...]."""

    @property
    @abstractmethod
    def mean_rows(self) -> float:
        """Rows of a crop now, padding included, in the mean over crops."""

    def expand(self, values: Tensor, layer: int | None = None) -> Tensor:
        """`spread` of values that a row had in `layer`, None for now."""
        seen = [places for stage, places in self.left if layer is None or stage <= layer]
        return self.spread(values, seen[-1]) if seen else values


class Crops(Seats):
    """A batch of crops, [crops, prefix + P, D]; a token is a square of `unit` patches a side.

    Behind the first stage the patches of a token follow one another. raster: rows and columns of the patches.
    """

    def __init__(self, hidden: Tensor, prefix: int, raster: Raster | None, unit: int) -> None:
        crops, device = hidden.shape[0], hidden.device
        self.patches, self.size, self.left = hidden.shape[1] - prefix, unit**2, []
        self.order: Tensor | None = None  # [P] the patches, token by token
        if raster is None or raster[0] * raster[1] != self.patches:
            side = int(self.patches**0.5)
            raster = (side, side) if side * side == self.patches else None
        if unit > 1:
            assert raster is not None, "squares of patches need a raster"
            raster = raster[0] // unit, raster[1] // unit
            place = torch.arange(self.patches, device=device).view(raster[0], unit, raster[1], unit)
            self.order = place.transpose(1, 2).flatten()
        self.part = Part.whole(crops, self.patches // self.size, raster, prefix, device)
        self.parts = (self.part,)

    @property
    def mean_rows(self) -> int:
        return self.part.prefix + (self.part.batch.width - self.part.prefix) * self.size

    def tokens(self, hidden: Tensor) -> list[Tensor]:
        if self.order is None:
            return [hidden]
        lead, rows = hidden[:, : self.part.prefix], hidden[:, self.part.prefix :]
        rows = rows if self.left else rows[:, self.order]
        wide = rows.reshape(len(rows), rows.shape[1] // self.size, -1)
        return [torch.cat([torch.nn.functional.pad(lead, (0, wide.shape[2] - lead.shape[2])), wide], dim=1)]

    def rows(self, layer: int, tokens: Sequence[Tensor]) -> Tensor:
        items, (rows,) = self.part.items, tokens
        places = torch.where(items.mask, items.token, self.part.tokens)
        if self.order is not None:
            table = torch.nn.functional.pad(self.order.view(-1, self.size), (0, 0, 0, 1), value=self.patches)
            places = table[places].flatten(1)
            lead, wide = rows[:, : self.part.prefix], rows[:, self.part.prefix :]
            width = wide.shape[2] // self.size
            rows = torch.cat([lead[..., :width], wide.reshape(len(wide), -1, width)], dim=1)
        self.left.append((layer, places))
        return rows

    def spread(self, values: Tensor, places: Tensor) -> Tensor:
        prefix = values.shape[1] - places.shape[1]
        full = values.new_zeros(values.shape[0], prefix + self.patches + 1, *values.shape[2:])
        crop = torch.arange(values.shape[0], device=values.device)[:, None]
        full = full.index_put_((crop, places + prefix), values[:, prefix:])[:, :-1]
        return torch.cat([values[:, :prefix], full[:, prefix:]], dim=1) if prefix else full

    def members(self, values: Tensor, part: Part) -> Tensor:
        values = values[:, values.shape[1] - self.patches :]
        values = values if self.order is None else values[:, self.order]
        return values.reshape(len(values), -1, self.size, *values.shape[2:])

    def lead(self, values: Tensor, part: Part) -> Tensor:
        return values[:, : values.shape[1] - self.patches]

    def of_rows(self, values: Tensor) -> Tensor:
        """[crops, prefix + N] one value for each row of tokens -> one for each row of the encoder."""
        prefix = self.part.prefix
        return torch.cat([values[:, :prefix], values[:, prefix:].repeat_interleave(self.size, dim=1)], dim=1)


class Packed(Seats):
    """All crops one behind the other in one sequence, [P, D], in which the patches of a token are neighbours.

    rasters: rows and columns of the tokens of each crop. order: [P / size] place of every token in the sequence, crop
    by crop and row by row in each; None where it is just that. Survivors keep the order of the sequence.
    """

    def __init__(self, hidden: Tensor, rasters: Sequence[Raster], order: Tensor | None, size: int) -> None:
        device = hidden.device
        self.patches, self.size, self.left, self.crops = hidden.shape[0], size, [], len(rasters)
        seat = torch.arange(self.patches // size, device=device) if order is None else order.to(device)
        parts = torch.split(seat, [height * width for height, width in rasters])
        self.parts, self.seats = [], []
        for raster in dict.fromkeys(rasters):
            same = torch.stack([part for part, other in zip(parts, rasters, strict=True) if other == raster])
            self.parts.append(Part.whole(len(same), same.shape[1], raster, 0, device))
            self.seats.append(same)  # [crops, N] place of each token

    @property
    def now(self) -> Tensor:
        """[P'] original place of every row there is."""
        return self.left[-1][1] if self.left else torch.arange(self.patches, device=self.seats[0].device)

    @property
    def mean_rows(self) -> float:
        return len(self.now) / self.crops

    def _seats(self, number: int) -> Tensor:
        """[crops, N] place of each token that a part still has."""
        return self.seats[number].gather(1, self.parts[number].items.token)

    def tokens(self, hidden: Tensor) -> list[Tensor]:
        held = self.now[:: self.size] // self.size
        where = torch.zeros(self.patches // self.size, dtype=torch.long, device=hidden.device)
        where = where.scatter(0, held, torch.arange(len(held), device=hidden.device))
        wide = hidden.view(len(held), -1)
        return [wide[where[self._seats(number)]] for number in range(len(self.parts))]

    def rows(self, layer: int, tokens: Sequence[Tensor]) -> Tensor:
        total, beyond = sum(sum(part.items.counts) for part in self.parts), self.patches // self.size
        seats = [
            torch.where(part.items.mask, self._seats(number), beyond).flatten()
            for number, part in enumerate(self.parts)
        ]
        seat, order = torch.cat(seats).sort()
        wide = torch.cat([rows.flatten(0, 1) for rows in tokens])[order[:total]]
        member = torch.arange(self.size, device=seat.device)
        self.left.append((layer, (seat[:total, None] * self.size + member).flatten()))
        return wide.view(total * self.size, -1)

    def spread(self, values: Tensor, places: Tensor) -> Tensor:
        return values.new_zeros(1, self.patches, *values.shape[2:]).index_copy(1, places, values)

    def joined(self, values: Tensor) -> Tensor:
        """One row [n, D] for each token there is -> one for each of the first, zeros where none is left."""
        if not self.left:
            return values
        places = self.now[:: self.size] // self.size
        return values.new_zeros(self.patches // self.size, *values.shape[1:]).index_copy(0, places, values)

    def members(self, values: Tensor, part: Part) -> Tensor:
        tokens = values.reshape(-1, self.size, *values.shape[2:])
        return tokens[self.seats[self.parts.index(part)]]

    def lead(self, values: Tensor, part: Part) -> Tensor:
        return values.new_zeros(len(part.items), 0, *values.shape[2:])


def _crop(tokens: int, raster: Raster | None, device: torch.device) -> VisualItem:
    place = torch.arange(tokens, device=device)
    height, width = raster or (1, tokens)
    return VisualItem(
        kind="image",
        n_tokens=tokens,
        crop=torch.zeros_like(place),
        row=(place // width).float(),
        col=(place % width).float(),
        newline=torch.zeros(tokens, dtype=torch.bool, device=device),
        n_crops=1,
        crop_grid=(height, width),
        grid=None if raster is None else (1, height, width),
    )
