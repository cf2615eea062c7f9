"""HiPrune: anchors of a middle encoder layer, their neighbours, and registers of the feature layer (arXiv:2508.00553).

Section numbers refer to that paper. Its released code is the reference for layer numbers, rounding and borders.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.groups import Parts, largest_share
from vtc.method.layout import item_lines
from vtc.method.registry import register
from vtc.methods.hiprune.neighbours import Border, hierarchical, neighbours, tile_places
from vtc.ops.host import put
from vtc.ops.select import apportion, group_sizes

Collision = Literal["exact", "official"]
Split = Literal["exact", "floor"]
Newlines = Literal["drop", "rows", "keep"]
DEPTH, DEPTH_MROPE = 3 / 8, 1 / 2
"""Depth of the object layer: 9 of 24 layers in CLIP ViT-L, 16 of 32 in the encoder of Qwen2.5-VL."""


@register
class HiPrune(Compressor):
    """Keep what a middle encoder layer attends to most, its four neighbours, and what the last layer attends to most.

    Acts before the LLM; training-free, blind to the text, works with and without a class token. Both scores are the
    attention a patch receives, mean over heads and over all queries (the class token's included), averaged where
    several patches make one token: o of the object layer, d of the feature layer. In every tile or frame with n tokens
    in rows of W and a budget N':

    1. anchors: the round(N' * alpha / 5) tokens with the largest o (half rounds to even);
    2. buffers: the tokens at p - 1, p + 1, p - W, p + W of every anchor p;
    3. registers: of all other tokens those with the largest d, until there are N'.

    Kept tokens stay in their order. Where anchors and buffers exceed N' (alpha near 1), buffers with low o go first.

    alpha: share of the budget for anchors and buffers, 0 to 1; 0.1 everywhere in the paper's experiments.
    object_layer: the middle layer, counted from 1 as in the paper; by default 3/8 of the encoder's depth (9 of 24),
    under multi-axis positions half of it (16 of 32), and with window attention the nearest layer that sees the whole
    image. border: "clamp" as released: +-1 runs on into the next row, and places outside the tile become its first or
    last token. "drop": no neighbours across borders. collision: how registers leave anchors and buffers out: "exact",
    or "official" by taking 1 from their d as released. That is exact for the mean over queries, which the release
    takes with a class token, but not for the sum over queries, which it takes without: there tokens are chosen twice
    and fewer than N' are kept. split: how tiles share the budget: "exact" in proportion to their tokens by largest
    remainders, "floor" as released the same for all, without the remainder. newlines: separators of tiled images:
    "drop" as released (their share of the budget goes to tokens), "rows" keeps those of rows that still have tokens
    (what the others leave of the budget is not spent), "keep" all.

    Departures from the paper and its code: registers are excluded exactly and the budget is met (the release may keep
    fewer on Qwen2.5-VL); tiles share the whole budget instead of losing the remainder; margins that pad a picture to
    its tiling never enter the prompt, so they cannot be kept, and neighbours are looked up among the tokens that a
    tile has in the prompt; several images, videos (per frame) and encoders other than CLIP ViT-L and Qwen2.5-VL follow
    the same rule; budgets that leave room beside all tokens are spent on separators, and a budget of everything runs
    the model untouched; the text-guided HiPrune++ is left out.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("hiprune", object_layer=9).plan(llava).needs.vision
    {8: Received(), 22: Received()}
    """

    alpha: float = 0.1
    object_layer: int | None = None
    border: Border = "clamp"
    collision: Collision = "exact"
    split: Split = "exact"
    newlines: Newlines = "drop"

    name = "hiprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise VTCError(
                f"alpha={self.alpha!r} is no share of the budget; pass a number from 0 (registers only) to 1, the "
                "paper uses 0.1"
            )
        if self.object_layer is not None and self.object_layer < 1:
            raise VTCError(
                f"object_layer={self.object_layer!r} is no layer; they are counted from 1 as in the paper, which uses "
                "9 of 24 and 16 of 32"
            )

    def layers(self, model: ModelSpec) -> tuple[int, int]:
        """0-based object layer and deep layer of this encoder."""
        seeing = [layer for layer in model.full_attention_layers if layer <= model.feature_layer]
        if not seeing:
            raise UnsupportedMethod(f"no encoder layer of this {model.family} model sees a whole image")
        if self.object_layer is None:
            share = DEPTH_MROPE if model.mrope else DEPTH
            wanted = max(1, round(model.vision_layers * share)) - 1
            return min(seeing, key=lambda layer: (abs(layer - wanted), -layer)), seeing[-1]
        if self.object_layer - 1 not in seeing:
            known = ", ".join(str(layer + 1) for layer in seeing)
            raise UnsupportedMethod(
                f"object_layer={self.object_layer} of this {model.family} model lies behind the features or sees only "
                f"windows of the image; choose from {known} (counted from 1)"
            )
        return self.object_layer - 1, seeing[-1]

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(vision=dict.fromkeys(self.layers(model), Rows.RECEIVED))
        return dataclasses.replace(super().plan(model), needs=needs)

    def select(self, view: StageView) -> Selection:
        items = view.items
        middle, deep = (view.vision_attention(layer, Rows.RECEIVED) for layer in self.layers(view.model))
        near = neighbours(view.crop, *_places(view), items.mask, self.border, whole=view.framed)
        budget = view.keep
        if self.newlines == "drop":
            budget = tuple(min(total, now) for total, now in zip(view.granted, items.counts, strict=True))
        share = _shares(view, budget, self.split)
        penalty = _penalty(view) if self.collision == "official" else None
        anchors = anchors_of(share, self.alpha)
        columns = zip(budget, items.counts, items.layouts, strict=True)
        most = max((largest_share(k, n, layout.crop_sizes) for k, n, layout in columns), default=0)
        tiles, share, anchors = Parts.of(view, "crop"), share.flatten(), anchors.flatten()
        kept = hierarchical(middle, deep, near, tiles, share, anchors, penalty, most=most)
        exact = self.collision == "exact" and self.split == "exact"
        separators = _separators(view, kept, self.newlines)
        return Selection(kept, counts=budget if exact else None, separators=separators, scores=deep)


def anchors_of(share: Tensor, alpha: float) -> Tensor:
    """Anchors of tiles with a budget of `share` tokens each, in the release's order of operations.

    >>> anchors_of(torch.tensor([192, 128, 64, 25]), 0.1).tolist()
    [4, 3, 1, 0]
    """
    return (share.double() * alpha / 5).round().long()  # half rounds to even


def _places(view: StageView) -> tuple[Tensor, Tensor, Tensor]:
    """[I, N] place, columns and places of each token's tile, numbered over all tokens that the encoder emitted."""
    if view.framed:  # the rasters tell; nothing has to be numbered
        row, col, height, width = item_lines(view.items.layouts, view.device)
        return row * width + col, width, height * width
    geometry = [
        pad_sequence([getattr(item, name) for item in view.items.layouts], batch_first=True, padding_value=-1)
        for name in ("crop", "row", "col")
    ]
    crop, row, col = (each.to(view.device, non_blocking=True) for each in geometry)
    place, width, size = (each.gather(1, view.items.token) for each in tile_places(crop, row, col, crop >= 0))
    return place, width, size


def _shares(view: StageView, budget: Sequence[int], split: Split) -> Tensor:
    """[I, G] budget of every tile."""
    sizes, device = group_sizes(view.crop, view.most_crops, view.items.mask), view.device
    if split == "exact":
        return apportion(put(budget, device), sizes)
    floor = [total // layout.n_crops for total, layout in zip(budget, view.items.layouts, strict=True)]
    return put(floor, device)[:, None].minimum(sizes)


def _penalty(view: StageView) -> Tensor:
    """[I, 1] one, in units of the mean over queries where the release takes their sum."""
    queries = [1 if view.model.has_cls else math.prod(layout.crop_grid) for layout in view.items.layouts]
    return 1 / put(queries, view.device)[:, None]


def _separators(view: StageView, kept: Tensor, newlines: Newlines) -> Tensor | Literal[False] | None:
    """What `Selection.separators` asks for; a budget above all tokens is spent on the first separators."""
    items, separators = view.items, view.separators
    if newlines == "keep" or not any(items.fixed):
        return None
    device = kept.device
    if newlines == "drop":
        spare = [max(0, total - now) for total, now in zip(view.granted, items.counts, strict=True)]
        if not any(spare):
            return False
        slots = torch.arange(separators.mask.shape[1], device=device)
        return slots < put(spare, device)[:, None]
    # The rows that end in separators are those of an item's last raster.
    begin = [layout.selectable - math.prod(layout.regions[-1]) if layout.regions else 0 for layout in items.layouts]
    counted = kept & items.mask & (items.token >= put(begin, device)[:, None])
    longest = max(layout.n_tokens for layout in items.layouts)
    total = torch.zeros(len(items), longest, dtype=torch.long, device=device)
    total = total.scatter_add(1, items.token, counted.long()).cumsum(1).gather(1, separators.token)
    return total > torch.nn.functional.pad(total, (1, 0))[:, :-1]
