"""LLaVA-OneVision: AnyRes tiles shrunk to a largest area, several images untiled, videos pooled frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.adapters.anyres import AnyResAdapter, Size
from vtc.batch.context import VisionContext
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind


class LlavaOnevisionAdapter(AnyResAdapter):
    """LlavaOnevisionForConditionalGeneration.

    model
    ├── vision_tower (.vision_model up to transformers 5.17) .encoder.layers[i].self_attn
    ├── multi_modal_projector
    ├── image_newline
    └── language_model .layers[i].self_attn
    lm_head

    A stitched map of more than 1.21 times the area that `vision_aspect_ratio` ("anyres_max_9": nine crops) allows is
    shrunk bilinearly, so one token stands for several patches there. Images of a prompt that holds several are not
    tiled. A video has one newline, behind its last frame. Its frames are resized to half their side, rounded up: from
    an even side every token is the mean of 2 x 2 patches, from an odd one (27 in published checkpoints) neighbouring
    tokens share patches.
    """

    family = "llava-onevision"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaOnevisionForConditionalGeneration",)
    modalities: ClassVar[tuple[Kind, ...]] = ("image", "video")
    towers: ClassVar[tuple[str, ...]] = ("SigLIP",)
    references: ClassVar[tuple[ModelSpec, ...]] = (
        # LLaVA-OneVision-7B, SigLIP-So400m/14-384
        ModelSpec("llava-onevision", 26, 25, False, tuple(range(26)), 28, encoder_stages=True, joins=True),
    )

    def unit(self, kind: Kind) -> int:
        return 1 if kind == "image" else 0 if self.side % 2 else 2  # from an odd side, pooling weighs neighbours anew

    def pools(self, kind: Kind) -> bool:
        return kind == "video"

    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        if kind == "image":
            return self.describe_images(arguments)
        return self.describe_videos(arguments, self.backbone.apply_pooling, newline=True)

    def is_tiled(self, arguments: Mapping[str, Any], images: int) -> list[bool]:
        per_prompt = arguments.get("batch_num_images")
        if per_prompt is None:
            return [True] * images
        return [count == 1 for count in per_prompt.tolist() for _ in range(count)]

    def pack_images(self, crops: list[Tensor], sizes: list[Size], arguments: dict[str, Any]) -> list[Tensor]:
        newline = torch.full(crops[0].shape[-1:], torch.nan)
        limit = arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        packed: list[Tensor] = self.backbone.pack_image_features(
            crops, sizes, image_newline=newline, vision_aspect_ratio=limit
        )[0]
        return packed
