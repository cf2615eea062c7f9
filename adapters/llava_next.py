"""LLaVA-NeXT (LLaVA-1.6): AnyRes tiles, a CLIP tower, one LLM token per patch that unpadding leaves."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapters.anyres import AnyResAdapter, Size
from vtc.batch.context import VisionContext
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind


class LlavaNextAdapter(AnyResAdapter):
    """LlavaNextForConditionalGeneration.

    model
    ├── vision_tower (.vision_model up to transformers 5.17) .encoder.layers[i].self_attn
    ├── multi_modal_projector
    ├── image_newline
    └── language_model .layers[i].self_attn
    lm_head

    Checkpoints with Mistral as text model run if their configuration has sliding_window=None.
    """

    family = "llava-next"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration",)
    towers: ClassVar[tuple[str, ...]] = ("CLIP", "SigLIP")
    references: ClassVar[tuple[ModelSpec, ...]] = (
        ModelSpec(
            "llava-next", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, clip=True
        ),  # LLaVA-NeXT-7B, CLIP-L/14-336
        ModelSpec("llava-next", 27, 26, False, tuple(range(27)), 32, encoder_stages=True),  # a SigLIP-So400m tower
    )

    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        return self.describe_images(arguments)

    def pack_images(self, crops: list[Tensor], sizes: list[Size], arguments: dict[str, Any]) -> list[Tensor]:
        newline = torch.full(crops[0].shape[-1:], torch.nan)
        packed: list[Tensor] = self.backbone.pack_image_features(
            crops, sizes, vision_feature_select_strategy="full", image_newline=newline
        )[0]
        return packed
