"""FasterVLM: the patches that the class token attends to (arXiv:2412.01818, version 1)."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import ClassVar

from torch import Tensor

from vtc.method.base import ModelSpec, Needs, Plan, Scope, ScoringCompressor, StageView
from vtc.method.registry import register


@register
class FasterVLM(ScoringCompressor):
    """Keep the patches that the class token attends to most in the layer whose output is projected.

    Acts before the LLM; training-free, text-agnostic (version 1 of arXiv:2412.01818). Score of patch j:
    ``s_j = mean_h A_p[h, CLS, j]``, p being the last encoder layer but one of CLIP. Ties go to the lower index, kept
    tokens stay in raster order. The same as `vispruner` with share=1 and as `vtc_cls` with layers=1.

    scope: "crop" keeps the same share of every crop, tile or frame, "item" ranks them together.

    Departures from the paper and its code: encoders without a class token use the attention a patch receives, mean over
    heads and queries, in the last layer up to the features that sees the whole image; newline tokens stay; crops keep
    the same share, not the same count.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("fastervlm").plan(llava).needs.vision
    {22: ClassRow()}
    """

    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "fastervlm"

    def plan(self, model: ModelSpec) -> Plan:
        attention = model.patch_attention
        return dataclasses.replace(super().plan(model), needs=Needs(vision={model.key_layer: attention}))

    def score(self, view: StageView) -> Tensor:
        return view.vision_attention(view.model.key_layer)
