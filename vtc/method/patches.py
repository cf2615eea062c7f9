"""What the projector made of an item's patches, before a model pools them to the tokens of its LLM."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.method.items import ItemTable
from vtc.method.layout import VisualItem
from vtc.ops.grid import Grid, cell_centres
from vtc.ops.host import put


class Patches(NamedTuple):
    """rows: [I, P, D]. mask: [I, P]. number: [I, P] of each in its item. regions: the full rasters of each item, in the
    order of its patches. pooled: whether an item's patches are others than its tokens. middle: [I, N] the patch in the
    middle of each token, None where all patches are tokens.
    """

    rows: Tensor
    mask: Tensor
    number: Tensor
    regions: tuple[tuple[Grid, ...], ...]
    pooled: tuple[bool, ...]
    middle: Tensor | None

    def anchors(self, marks: Tensor, mask: Tensor) -> Tensor:
        """[I, N] bool: for marked patches [I, P] as many tokens, where there is a choice the first; mask: [I, N]."""
        if self.middle is None:
            return marks
        first = mask & (torch.arange(mask.shape[1], device=mask.device) < marks.sum(1, keepdim=True))
        return torch.where(put(self.pooled, mask.device)[:, None], first, marks[:, : mask.shape[1]])

    def of_tokens(self, values: Tensor) -> Tensor:
        """[I, P] a value of each patch -> [I, N] that of the patch in the middle of each token."""
        return values if self.middle is None else values.gather(1, self.middle)


def patches(tokens: Tensor, items: ItemTable, unpooled: tuple[Tensor, tuple[int, ...]] | None) -> Patches:
    """The patches of items whose frames are pooled, the tokens [I, N, D] of all others.

    unpooled: [S, P, D] rows of every source, zero-padded, and how many these are, 0 where nothing is pooled.
    """
    device, layouts = tokens.device, items.layouts
    held = [0 if unpooled is None else unpooled[1][source] for source in items.sources]
    regions = tuple(_raster(each) if n else each.regions for each, n in zip(layouts, held, strict=True))
    pooled = tuple(n > 0 for n in held)
    if unpooled is None or not any(pooled):
        return Patches(tokens, items.mask, items.token, regions, pooled, None)
    rows = unpooled[0][items.source].to(tokens)
    width = max(rows.shape[1], tokens.shape[1])
    limit, number = put(held, device)[:, None], torch.arange(width, device=device).expand(len(held), -1)

    def chosen(one: Tensor, other: Tensor) -> Tensor:
        """[I, width, ...] of patches where an item is pooled, else of its tokens."""
        wide = [torch.cat([x, x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])], dim=1) for x in (one, other)]
        return torch.where((limit > 0).view(-1, *(1,) * (one.ndim - 1)), wide[0], wide[1])

    own = number[:, : tokens.shape[1]]
    middles = pad_sequence(
        [
            _middles(rasters[0], each.regions[0]) if n else torch.zeros(1, dtype=torch.long)
            for rasters, each, n in zip(regions, layouts, held, strict=True)
        ],
        batch_first=True,
    ).to(device, non_blocking=True)
    return Patches(
        chosen(rows, tokens),
        chosen(number < limit, items.mask),
        chosen(number, items.token),
        regions,
        pooled,
        torch.where(limit > 0, middles.gather(1, items.token.clamp(max=middles.shape[1] - 1)), own),
    )


def _raster(layout: VisualItem) -> tuple[Grid, ...]:
    return ((layout.n_crops, *layout.crop_grid),)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may meet a training later
def _middles(grid: Grid, output: Grid) -> Tensor:
    """[n] patch in the middle of each token of frames that were pooled."""
    return cell_centres(grid, output)
