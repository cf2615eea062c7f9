"""Items in parts, their crops or frames: methods that choose in each part on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.method.view import StageView
from vtc.ops.greedy import chosen
from vtc.ops.host import put
from vtc.ops.nearest import means
from vtc.ops.select import apportion, out_of_groups, top_k

Scope = Literal["item", "crop"]
"""Whether tokens are ranked or merged over the whole item or in each of its crops, tiles or frames."""


@dataclass(frozen=True, eq=False)
class Parts:
    """R parts of at most W tokens: the items themselves, or their crops one behind the other.

    mask: [R, W], the places that hold a token. place: [R, W] of each token in its item, None where the parts of an item
    are equal shares of its row, one behind the other. items: [I, N], the mask of the items. full: every place holds a
    token, as the host knows.
    """

    mask: Tensor
    place: Tensor | None
    items: Tensor
    full: bool = False

    @staticmethod
    def of(view: StageView, scope: Scope) -> Parts:
        """The items of a view or their crops."""
        items, mask = view.items, view.items.mask
        if scope == "item" or view.most_crops == 1:
            return Parts(mask, None, mask, items.full)
        sizes = {size for layout in items.layouts for size in layout.crop_sizes}
        if view.framed and items.full and sizes == {mask.shape[1] // view.most_crops}:
            return Parts(mask.view(len(mask) * view.most_crops, -1), None, mask, full=True)
        place, real = view.crops
        return Parts(real.flatten(0, 1), place.flatten(0, 1), mask)

    def take(self, values: Tensor) -> Tensor:
        """[I, N, ...] of the items -> [R, W, ...] of the parts."""
        if self.place is None:
            return values.reshape(*self.mask.shape, *values.shape[2:])
        if values.ndim == 2:
            return values.gather(1, self.place.view(len(values), -1)).view_as(self.place)
        item = torch.arange(len(values), device=values.device).repeat_interleave(len(self.place) // len(values))
        return values[item[:, None], self.place]

    def give(self, values: Tensor) -> Tensor:
        """[R, W, ...] of the parts -> [I, N, ...] of the items, zero or False where a token lies in no part."""
        if self.place is None:
            return values.reshape(*self.items.shape, *values.shape[2:])
        items, length = self.items.shape
        if values.ndim == 2:
            values, place, real = (each.view(items, -1, each.shape[1]) for each in (values, self.place, self.mask))
            return out_of_groups(values, place, real, length)
        item = torch.arange(items, device=values.device).repeat_interleave(len(self.place) // items)
        slot = torch.where(self.mask, self.place, length) + (length + 1) * item[:, None]
        flat = values.new_zeros(items * (length + 1), *values.shape[2:]).index_put_((slot,), values)
        return flat.unflatten(0, (items, -1))[:, :length]  # type: ignore[no-untyped-call, no-any-return]

    @property
    def numbers(self) -> Tensor:
        """[R, W] the place of each token in its item."""
        return self.take(torch.arange(self.items.shape[1], device=self.items.device).expand_as(self.items).contiguous())

    def joined(
        self, x: Tensor, centre: Tensor, alone: Tensor | None = None, own: float = 0.0, most: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clusters as one token each: what every token is afterwards, and where it went; of the items.

        x: [R, W, D]. centre: [R, W] place of the one of its part that each token joins, centres their own, -1 for none.
        own: what a centre counts for, beside the mean of its cluster. alone: [R, W] bool, tokens that stay as they are.
        most: no part has more centres, where the host knows.
        Returns tokens [I, N, D], rows of what did not stay meaning nothing, and places [I, N], -1 for nowhere.
        """
        if alone is not None:  # each its own centre
            centre = torch.where(alone, torch.arange(centre.shape[1], device=centre.device), centre)
        tokens = means(x, centre, most)
        if own:
            tokens = torch.lerp(tokens, x, own)
        home = torch.where(centre < 0, -1, self.numbers.gather(1, centre.clamp(min=0)))
        return self.give(tokens), torch.where(self.items, self.give(home), -1)

    def best(self, scores: Tensor, keep: Tensor, most: int | None = None) -> Tensor:
        """Mark the `keep` [R] highest of the parts' scores [R, W], none of them more than `most`; bool [R, W]."""
        return top_k(scores, keep, None if self.full else self.mask, most=most)


@dataclass(frozen=True, eq=False)
class Groups:
    """Parts with a budget. keep: [R] tokens that a part may keep. steps: no part may keep more."""

    parts: Parts
    keep: Tensor
    steps: int

    @staticmethod
    def of(view: StageView, scope: Scope) -> Groups:
        """The parts of a view; with scope "crop" an item's budget is split in proportion to the sizes of its crops."""
        parts, layouts = Parts.of(view, scope), view.items.layouts
        keep = put(view.keep, parts.mask.device)
        if len(parts.mask) == len(keep):
            return Groups(parts, keep, max(view.keep, default=0))
        share = apportion(keep, parts.mask.view(len(keep), -1, parts.mask.shape[1]).sum(2)).flatten()
        columns = zip(view.keep, view.items.counts, layouts, strict=True)
        return Groups(parts, share, max(largest_share(k, n, layout.crop_sizes) for k, n, layout in columns))

    def chosen(self, order: Tensor) -> Tensor:
        """Mark what the parts keep of their orders [R, steps]; bool [I, N] over the items."""
        return self.parts.give(chosen(order, self.keep, self.parts.mask))

    def best(self, scores: Tensor) -> Tensor:
        """Mark what the parts keep by their items' scores [I, N], the highest of each; bool [I, N]."""
        return self.parts.give(self.parts.best(self.parts.take(scores), self.keep, self.steps))


def largest_share(keep: int, count: int, sizes: Sequence[int]) -> int:
    """No crop may keep more of the item's `keep` tokens; only a bound where an earlier stage thinned the crops."""
    if sum(sizes) != count:
        return min(keep, max(sizes))
    return max(min(size, size * keep // count + 1) for size in sizes)
