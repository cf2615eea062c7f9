"""SCOPE: tokens that resemble what no chosen one resembles yet, counted by attention (arXiv:2510.24214)."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import ClassVar

import torch

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Scope, Selection, StageView
from vtc.method.groups import Groups
from vtc.method.registry import register
from vtc.ops.coverage import coverage


@register
class SCOPE(Compressor):
    """Add one token at a time, the one that covers most of what is not covered yet, times what it receives.

    Acts before the LLM; training-free, text-agnostic. With the cosines C of the encoder's features (the layer p whose
    output is projected), the class token's attention A of layer p, mean over heads, and ``c_u = max(0, max C_uj)`` over
    the chosen j, the next token is that of largest ``A_j^alpha sum_u max(0, C_uj - c_u)``. Ties go to the lower index,
    kept tokens stay in raster order.

    alpha: weight of attention, 1 in the code; 0 is coverage alone. scope: "crop" chooses in every crop, tile or frame
    the same share of its tokens, "item" among all tokens together.

    Departures from the paper and its code: tokens leave behind the projector, which changes none that stay. Encoders
    without a class token use the attention a patch receives, mean over heads and queries, in the last layer up to the
    features that sees the whole image. Newline tokens stay; crops keep the same share, not the same count.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("scope").plan(llava).needs.vision
    {22: (ClassRow(), LayerOutput())}
    """

    alpha: float = 1.0
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "scope"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise VTCError(f"alpha={self.alpha!r} would prefer what nothing attends to; pass 0 or more, the code has 1")

    def plan(self, model: ModelSpec) -> Plan:
        needs = Needs(vision={model.key_layer: (model.patch_attention, Rows.HIDDEN)})
        return dataclasses.replace(super().plan(model), needs=needs)

    @torch.no_grad()
    def select(self, view: StageView) -> Selection:
        groups, layer = Groups.of(view, self.scope), view.model.key_layer
        score = view.vision_attention(layer, view.model.patch_attention).float()
        features = groups.parts.take(view.vision_attention(layer, Rows.HIDDEN))
        worth = groups.parts.take(score).clamp(min=0) ** self.alpha
        order = coverage(features, worth, groups.steps, groups.parts.mask)
        return Selection(groups.chosen(order), counts=view.keep, scores=score)
