"""Hidden states of a batch's rows: at hand, or looked up for those that are asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtc.method.items import ItemTable
from vtc.ops.select import take_rows


class States:
    """Hidden states [B, L, D] that are there."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self._hidden.device

    def all(self) -> Tensor:
        """[B, L, D] of every row."""
        return self._hidden

    def take(self, index: Tensor) -> Tensor:
        """[B, L', D] of the rows that `index` [B, L'] names."""
        return take_rows(self._hidden, index)

    def of(self, items: ItemTable) -> Tensor:
        """[I, N, D] of the items' tokens; harmless values behind an item's end."""
        return self._hidden[items.row[:, None], items.index]


class LookedUp(States):
    """What would enter the language model, not yet put together: [B, L] rows are words or encoder outputs.

    embed: [B, L'] ids -> [B, L', D]. ids: [B, L]. number: [B, L] entry of `features` [V, D], -1 for words. A row that
    nobody asks for is neither looked up nor copied; every row has the bits that the model would have given it.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], ids: Tensor, number: Tensor, features: Tensor) -> None:
        self._embed, self._ids, self._number, self._features = embed, ids, number, features

    @property
    def device(self) -> torch.device:
        return self._features.device

    def all(self) -> Tensor:
        return self._join(self._ids, self._number)

    def take(self, index: Tensor) -> Tensor:
        return self._join(self._ids.gather(1, index), self._number.gather(1, index))

    def of(self, items: ItemTable) -> Tensor:
        return self._features[self._number[items.row[:, None], items.index].clamp(min=0)]

    def _join(self, ids: Tensor, number: Tensor) -> Tensor:
        return torch.where((number < 0)[..., None], self._embed(ids), self._features[number.clamp(min=0)])
