"""Items cut into their crops or frames, for methods that choose in each of them on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.method.base import Scope, StageView
from vtc.ops.greedy import chosen
from vtc.ops.select import apportion, in_groups


@dataclass(frozen=True, eq=False)
class Groups:
    """R groups of at most W tokens: the items themselves, or their crops one behind the other.

    place: [R, W] of a group's tokens in its item, None where a group is an item. mask: [R, W]. keep: [R] tokens that a
    group may keep. steps: no group may keep more.
    """

    place: Tensor | None
    mask: Tensor
    keep: Tensor
    steps: int
    items: Tensor

    @staticmethod
    def of(view: StageView, scope: Scope) -> Groups:
        """The groups of a view; with scope "crop" an item's budget is split in proportion to the sizes of its crops."""
        items, mask = view.items, view.items.mask
        keep = torch.tensor(view.keep, device=mask.device)
        crops = max((layout.n_crops for layout in items.layouts), default=1)
        if scope == "item" or crops == 1:
            return Groups(None, mask, keep, max(view.keep, default=0), mask)
        sizes = [layout.crop_sizes for layout in items.layouts]
        width = min(mask.shape[1], max(map(max, sizes)))
        place, real = in_groups(view.crop, crops, width, mask)
        share = apportion(keep, real.sum(2))
        steps = max(map(_largest_share, view.keep, items.counts, sizes))
        return Groups(place.flatten(0, 1), real.flatten(0, 1), share.flatten(), steps, mask)

    def take(self, values: Tensor) -> Tensor:
        """[I, N, ...] of the items -> [R, W, ...] of the groups."""
        if self.place is None:
            return values
        item = torch.arange(len(values), device=values.device).repeat_interleave(len(self.place) // len(values))
        return values[item[:, None], self.place]

    def chosen(self, order: Tensor) -> Tensor:
        """Mark what the groups keep of their orders [R, steps]; bool [I, N] over the items."""
        marks = chosen(order, self.keep, self.mask)
        if self.place is None:
            return marks
        items, length = self.items.shape
        # Every token lies in one group; what fills a group up goes to a column that is cut off again.
        place = torch.where(self.mask, self.place, length).view(items, -1)
        kept = self.items.new_zeros(items, length + 1).scatter(1, place, marks.view(items, -1))
        return kept[:, :length]


def _largest_share(keep: int, count: int, sizes: Sequence[int]) -> int:
    """No crop may keep more of the item's `keep` tokens; only a bound where an earlier stage thinned the crops."""
    if sum(sizes) != count:
        return min(keep, max(sizes))
    return max(min(size, size * keep // count + 1) for size in sizes)
