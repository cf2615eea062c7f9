"""Merging the uniform windows of a view's items, whatever their layout: the part of a method between view and ops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.method.base import Selection, StageView
from vtc.methods.mustdrop.windows import (
    merge_windows,
    merged_first,
    raster_windows,
    window_count,
    window_members,
    window_similarity,
)
from vtc.ops.select import take_rows


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of all items of a view.

    members: [I, W, k] tokens of each window, whole: [I, W] bool, similarity: [I, W]; see
    `vtc.methods.mustdrop.windows`. counts: windows per item in its layout, on the host.
    """

    view: StageView
    members: Tensor
    whole: Tensor
    similarity: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, view: StageView, window: tuple[int, int]) -> Windows:
        """Cut the rasters of the view's items into windows of (rows, columns)."""
        counts = tuple(window_count(layout.regions, window) for layout in view.items.layouts)
        members, whole = window_members(_numbers(view, window), max(counts), math.prod(window))
        return cls(view, members, whole, window_similarity(view.tokens, members, whole), counts)

    def merge(self, chosen: Tensor, *, in_front: bool = False) -> Selection:
        """Average the chosen windows [I, W]; in_front: the merged tokens become the first ones of their item."""
        items = self.view.items
        tokens, keep, into = merge_windows(self.view.tokens, self.members, chosen)
        keep = keep & items.mask
        if in_front:
            order = merged_first(keep, self.members, chosen, self.similarity)
            tokens = take_rows(tokens, order)
            steps = torch.arange(keep.shape[1], device=keep.device).expand_as(order)
            place = torch.empty_like(order).scatter(1, order, steps)
            into = place.gather(1, torch.where(into < 0, steps, into))
        return Selection(keep, tokens=tokens, merged_into=into)

    def average(self, values: Tensor, chosen: Tensor, *, in_front: bool = False) -> Tensor:
        """[I, N] values of the tokens as they are after `merge`."""
        merged, keep, _ = merge_windows(values[..., None], self.members, chosen)
        if in_front:
            keep = keep & self.view.items.mask
            merged = take_rows(merged, merged_first(keep, self.members, chosen, self.similarity))
        return merged[..., 0]


def _numbers(view: StageView, window: tuple[int, int]) -> Tensor:
    """[I, N] window of each token, -1 for none."""
    device = view.hidden.device
    known: dict[int, Tensor] = {}
    for layout in view.items.layouts:
        if id(layout) not in known:
            newline = layout.newline.to(device)
            number = raster_windows(layout.regions, window, device)
            number = torch.nn.functional.pad(number, (0, layout.n_tokens - len(number)), value=-1)
            rank = (~newline).cumsum(0).clamp(min=1) - 1
            known[id(layout)] = number.gather(0, rank).masked_fill(newline, -1)
    numbers = pad_sequence([known[id(layout)] for layout in view.items.layouts], batch_first=True, padding_value=-1)
    return numbers.gather(1, view.items.token).masked_fill(~view.items.mask, -1)


def by_token(view: StageView, values: Tensor) -> Tensor:
    """[I, N] values of the tokens there are -> [I, Nmax] by the token's number in its item; zero for the others."""
    items = view.items
    width = max(layout.n_tokens for layout in items.layouts)  # input_counts may be what another method left
    table = values.new_zeros(len(items), width + 1)
    return table.scatter(1, torch.where(items.mask, items.token, width), values)[:, :width]
