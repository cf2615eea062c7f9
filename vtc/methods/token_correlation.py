"""Token-level correlation: crops of few duplicates get more, and two layers of attention choose (arXiv:2407.14439)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.groups import Parts
from vtc.method.plan import grouped
from vtc.method.readings import VisionReading
from vtc.method.registry import register
from vtc.ops.checks import numbers
from vtc.ops.frames import quotas
from vtc.ops.host import put
from vtc.ops.select import top_k

Count = Literal["budget", "density"]
BLOCK = 1 << 22
"""Similarities held at a time."""


@register
class TokenCorrelation(Compressor):
    """Share the budget over crops by how many of their patches repeat no other, and keep what the class token sees.

    Acts before the LLM; training-free, text-agnostic. Patch j of a crop repeats another if ``cos(k_i, k_j) >
    threshold`` for one i before it, k being the encoder's keys, heads concatenated, in the layer whose output is
    projected; a crop's density d is the share of its n patches that repeat none. The crops of an image share its tokens
    in proportion to d n, exactly, by largest remainder. Of the k tokens of a crop, round(share * k) are global, those
    that the class token attends to most in that layer, and the others local, those that it attends to most in a layer
    in the middle of the encoder, mean over heads; where both name a token, the next global ones follow. Ties go to the
    lower index, kept tokens stay in raster order.

    threshold: 0.85. share: half. count: "density" takes no budget but d n tokens of every crop, which depends on the
    image.

    Departures from the paper and its code: none is released, and what is known of the paper is that keys tell how dense
    a crop is, that the density is its budget, and that the class token's attention in two layers chooses; threshold,
    share, layers and the highest values instead of a draw are ours, and so is that one of several duplicates repeats
    none. Encoders without a class token use the attention a patch receives, mean over heads and queries; where encoders
    have windows, the layers are the last and the first from the middle on that see the whole image. Newline tokens
    stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("token_correlation").plan(llava).needs.vision
    {22: (Keys(), ClassRow()), 11: (ClassRow(),)}
    >>> vtc.create("token_correlation", count="density").needs_budget
    False
    """

    threshold: float = 0.85
    share: float = 0.5
    count: Count = "budget"

    name: ClassVar[str] = "token_correlation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1 or not 0 <= self.share <= 1:
            raise VTCError(
                f"threshold={self.threshold}, share={self.share}: duplicates have a cosine above a number from 0 up to "
                "below 1, and the global tokens are a share from 0 to 1; write for example threshold=0.85, share=0.5"
            )

    @property
    def needs_budget(self) -> bool:
        return self.count == "budget"

    @staticmethod
    def readings(model: ModelSpec) -> tuple[tuple[int, VisionReading], tuple[int, VisionReading]]:
        """The encoder layers that name global and local tokens, and what of them does."""
        deep, reading = model.key_layer, model.patch_attention
        middle = next(layer for layer in model.full_attention_layers if layer >= (deep + 1) // 2)
        return (deep, reading), (middle, reading)

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(grouped([(model.key_layer, Rows.KEYS), *self.readings(model)]))
        return dataclasses.replace(super().plan(model), needs=needs)

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        parts = Parts.of(view, "crop")
        keys = parts.take(view.vision_attention(view.model.key_layer, Rows.KEYS))
        keep = distinct(keys, parts.mask, self.threshold).sum(1)
        if self.needs_budget:
            density, size = (each.view(len(view.items), -1) for each in (keep, parts.mask.sum(1)))
            keep = quotas(density, put(view.keep, view.device), size).flatten()
        deep, middle = (view.vision_attention(*reading) for reading in self.readings(view.model))
        kept = both(parts.take(deep), parts.take(middle), keep, parts.mask, self.share)
        return Selection(parts.give(kept), counts=view.keep if self.needs_budget else None, scores=deep)


def distinct(x: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Mark the tokens whose cosine with every token before them is at most `threshold`; [R, W, D], [R, W] -> [R, W].

    mask: bool, the tokens there are, at the front. Streams over the tokens.

    >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    >>> distinct(x, torch.ones(1, 3, dtype=torch.bool), 0.85).tolist()
    [[True, False, True]]
    """
    unit = torch.nn.functional.normalize(numbers(x, mask).float(), dim=2)
    repeats, steps = torch.zeros_like(mask), torch.arange(mask.shape[1], device=mask.device)
    size = max(1, BLOCK // max(1, mask.numel()))
    for first in range(0, mask.shape[1], size):
        some, before = slice(first, first + size), slice(0, first + size)
        alike = torch.bmm(unit[:, some], unit[:, before].transpose(1, 2)) > threshold
        repeats[:, some] = (alike & (steps[before] < steps[some, None])).any(2)
    return mask & ~repeats


def both(deep: Tensor, middle: Tensor, keep: Tensor, mask: Tensor, share: float) -> Tensor:
    """Mark `keep` [R] tokens by two scores [R, W]: a share of them by the first, the others by the second.

    Where both name the same token the next ones by the first follow. mask: [R, W] bool.

    >>> deep, middle = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]])
    >>> both(deep, middle, torch.tensor([2]), torch.ones(1, 4, dtype=torch.bool), 0.5).tolist()
    [[True, True, False, False]]
    """
    first = (keep * share + 0.5).floor().long()
    kept = top_k(deep, first, mask) | top_k(middle, keep - first, mask)
    return kept | top_k(deep, keep - kept.sum(1), mask & ~kept)
