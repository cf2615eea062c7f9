"""VTC-CLS: the class token's attention tells which patches matter (arXiv:2412.05819)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs, Plan, Scope, ScoringCompressor, StageView
from vtc.method.registry import register

REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}


@register
class VTCCLS(ScoringCompressor):
    """Keep the patches to which the vision encoder's class token attends most, over several deep layers.

    Acts before the LLM; training-free, text-agnostic. Score of patch j: ``s_j = sum_l mean_h A_l[h, CLS, j]`` over the
    `layers` encoder layers that end at the feature layer (softmax over all keys, not renormalised without the class
    key). Ties go to the lower index, kept tokens stay in raster order, positions are renumbered without gaps.

    layers: K, the number of layers; the paper's K = 3 are layers 20-22 of CLIP-L. Encoders with fewer layers use all
    up to the feature layer. start_layer: first layer of the window (0-based) instead of `layers`; the released
    scripts default to 16 (K = 7). reduction: how layers are combined (sum and mean rank alike; max and min are the
    paper's alternatives).

    Departures from the paper and its code: batches and several images work, each item is ranked on its own; a budget
    of one token works; encoders without a class token (SigLIP, Qwen) use the attention a patch receives, mean over
    heads and queries, from layers that see the whole image; multi-axis rotary models keep original positions.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("vtc_cls", start_layer=20).plan(llava).needs.vision
    {20: ClassRow(), 21: ClassRow(), 22: ClassRow()}
    """

    layers: int = 3
    start_layer: int | None = None
    reduction: Literal["sum", "mean", "max", "min"] = "sum"
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "vtc_cls"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise VTCError(f"layers={self.layers} leaves no attention to rank by; pass at least 1, the paper uses 3")

    def window(self, model: ModelSpec) -> tuple[int, ...]:
        """The encoder layers whose attention is combined."""
        deep = [layer for layer in model.full_attention_layers if layer <= model.feature_layer]
        if self.start_layer is None:
            return tuple(deep[-self.layers :])
        chosen = tuple(layer for layer in deep if layer >= self.start_layer)
        if self.start_layer < 0 or not chosen:
            raise UnsupportedMethod(
                f"start_layer={self.start_layer} is not among the encoder layers 0 to {model.feature_layer} that lead "
                f"to the features of this {model.family} model"
            )
        return chosen

    def plan(self, model: ModelSpec) -> Plan:
        rows = model.patch_attention
        needs = Needs(vision=dict.fromkeys(self.window(model), rows))
        return dataclasses.replace(super().plan(model), needs=needs)

    def score(self, view: StageView) -> Tensor:
        return ensemble([view.vision_attention(layer) for layer in self.window(view.model)], self.reduction)


def ensemble(rows: list[Tensor], reduction: str = "sum") -> Tensor:
    """Combine head-mean attention rows of several layers, each [I, N], to scores [I, N] (float32)."""
    return REDUCTIONS[reduction](torch.stack(rows).float(), 0)
