"""VScan: patches that stand out where they are or in the whole, and fewer of them in the middle of the LLM."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import PRE_LLM, Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.groups import Parts, largest_share
from vtc.method.registry import register
from vtc.method.two_stages import layer_like, left
from vtc.ops.host import put
from vtc.ops.nearest import nearest_target
from vtc.ops.rank import rank_in_group
from vtc.ops.select import apportion, group_sizes, settle, top_k

EARLY = 5 / 24
"""How deep in the encoder windows are ranked: layer 5 of CLIP's 24, 7 of the 32 of Qwen2.5-VL."""


@register
class VScan(Compressor):
    """Keep patches that lead their window early in the encoder and those that lead the image late, and merge the rest.

    Training-free; the stage inside the LLM follows the question (arXiv:2505.22654). Before the LLM: of the k tokens of
    a crop, k // 2 are local, every window of w x w patches giving the same share of its tokens, rounded down: those
    with the highest ``mean_h A_e[h, CLS, j]`` in an early encoder layer e (without a class token, as in Qwen2.5-VL, the
    best of the crop, but of each of n windows no more than k // 2 / n, rounded up); the others are global, those of the
    rest with the highest value in the layer whose output is projected. Every token that is dropped goes into the kept
    one of its crop with the highest cosine of projected features, which becomes the mean of all that went into it. In
    front of layer L // 2 of the L layers of the LLM, a share of these tokens stays: those that the last prompt token
    attends to most, by that layer's own projections, mean over heads. Ties go to the lower index, kept tokens stay in
    raster order.

    window: w in patches, by default 6 with a class token and 8 (4 merged tokens) without. later: the share that the
    second stage leaves, a third as published (96 and 32 tokens for "64"). The budget is the mean over the layers of the
    LLM; where the first stage could keep all tokens, the second one leaves more.

    Departures from the paper and its code: what windows leave over by rounding goes to the global tokens, so that
    counts are exact; the crops of an image share its tokens in proportion to their sizes; what is left of a window at a
    border is a window of its own; towers without a class token use the attention a patch receives, mean over heads and
    queries, in the first layer from 5/24 of the depth on that sees the whole image; newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("vscan").plan(llava).needs.vision
    {5: ClassRow(), 22: ClassRow()}
    """

    window: int | None = None
    later: float = 1 / 3

    name: ClassVar[str] = "vscan"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.window is not None and self.window < 1) or not 0 < self.later <= 1:
            raise VTCError(
                f"window={self.window}, later={self.later}: a window has at least one patch, and the second stage "
                "leaves a share above 0 and up to 1; the paper uses windows of 6 or 8 patches and a third"
            )

    @staticmethod
    def early(model: ModelSpec) -> int:
        """The encoder layer that ranks windows."""
        wanted = math.floor(model.vision_layers * EARLY + 0.5)
        return next((layer for layer in model.full_attention_layers if layer >= wanted), model.key_layer)

    def plan(self, model: ModelSpec) -> Plan:
        layers, middle = (self.early(model), model.key_layer), layer_like(model, 1, 2)
        needs = Needs(dict.fromkeys(layers, model.patch_attention), {middle: Rows.LAST_AHEAD})
        return dataclasses.replace(super().plan(model), stages=(PRE_LLM, middle), needs=needs)

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        items, middle = view.items, layer_like(view.model, 1, 2)
        counts = left(view, self, middle, self.later)
        if counts == items.counts:
            return None
        if view.stage == PRE_LLM:
            return self.merged(view, counts)
        scores = view.llm_attention(middle, Rows.LAST_AHEAD)
        marks = top_k(scores, put(counts, view.device), items.gaps, most=max(counts))
        return Selection(marks, counts=counts, scores=scores)

    def merged(self, view: StageView, counts: tuple[int, ...]) -> Selection:
        """The first stage with `counts` tokens of each item."""
        kept, scores = self.scanned(view, counts)
        parts = Parts.of(view, "crop")
        x, stays = parts.take(view.tokens), parts.mask & (parts.take(kept.long()) > 0)
        columns = zip(counts, view.items.counts, view.items.layouts, strict=True)
        most = max(largest_share(k, n, layout.crop_sizes) for k, n, layout in columns)
        into = nearest_target(x, stays, parts.mask, most)
        tokens, home = parts.joined(x, into, most=most)
        return Selection(kept, counts=counts, tokens=tokens, merged_into=home, scores=scores)

    def scanned(self, view: StageView, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """[I, N] bool, the local and the global tokens; and the values in the late layer."""
        model, mask, crop, crops = view.model, view.items.mask, view.crop, view.most_crops
        side = self.window or (6 if model.has_cls else 8)
        sizes = group_sizes(crop, crops, mask)
        share = apportion(put(counts, view.device), sizes)
        at = torch.where(mask, crop, 0)
        row, col = (torch.floor_divide(each, side).long() for each in view.place)
        apart = torch.where(mask, (at << 32) + (row << 16) + col, -1)  # a number for each window
        early, late = (
            view.vision_attention(layer, model.patch_attention) for layer in (self.early(model), model.key_layer)
        )
        early, late = settle(early, mask), settle(late, mask)
        rank = rank_in_group(apart, best=early)
        held = rank_in_group(apart) + rank_in_group(apart.flip(1)).flip(1) + 1  # tokens of the window
        if model.has_cls:
            local = mask & (rank < (share // 2).gather(1, at) * held // sizes.gather(1, at).clamp(min=1))
        else:  # so many of the best, but no more of a window than its part
            windows = group_sizes(crop, crops, mask & (rank == 0)).clamp(min=1)
            leads = rank < (share // 2 + windows - 1).div(windows, rounding_mode="floor").gather(1, at)
            ahead = rank_in_group(torch.where(mask, at, crops), ~leads, best=early)
            local = mask & leads & (ahead < (share // 2).gather(1, at))
        rest = share - group_sizes(crop, crops, local)
        behind = torch.where(mask, at, crops)
        best = rank_in_group(behind, local, best=late) < rest.gather(1, at)
        return local | (mask & best & ~local), late
