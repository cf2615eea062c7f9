"""LLaVA-NeXT-Video: LLaVA-NeXT images, and videos whose frames are pooled in front of the projector."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from vtc.adapters.llava_next import LlavaNextAdapter
from vtc.batch.context import VisionContext
from vtc.errors import UnsupportedModel
from vtc.method.base import ModelSpec
from vtc.method.layout import Kind


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """LlavaNextVideoForConditionalGeneration.

    model
    ├── vision_tower (.vision_model up to transformers 5.17) .encoder.layers[i].self_attn
    ├── vision_resampler (videos)
    ├── multi_modal_projector
    ├── image_newline (images)
    └── language_model .layers[i].self_attn
    lm_head
    """

    family = "llava-next-video"
    model_classes: ClassVar[tuple[str, ...]] = ("LlavaNextVideoForConditionalGeneration",)
    modalities: ClassVar[tuple[Kind, ...]] = ("image", "video")
    towers: ClassVar[tuple[str, ...]] = ("CLIP",)
    references: ClassVar[tuple[ModelSpec, ...]] = (
        # LLaVA-NeXT-Video-7B, CLIP-L/14-336
        ModelSpec("llava-next-video", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, joins=True, clip=True),
    )

    def check(self) -> None:
        """Refuse resamplers that are no average, and what the base class refuses."""
        super().check()
        mode = self.model.config.spatial_pool_mode
        if mode != "average":
            raise UnsupportedModel(
                f"spatial_pool_mode={mode!r} is not supported: what a patch is worth cannot be carried over to the "
                "tokens of a video's frames; published checkpoints use 'average'"
            )

    def unit(self, kind: Kind) -> int:
        stride = int(self.model.config.spatial_pool_stride)
        return 1 if kind == "image" else 0 if self.side % stride else stride

    def gathering(self, kind: Kind) -> tuple[nn.Module, Literal["before", "behind"]] | None:
        return None if kind == "image" else (self.backbone.vision_resampler, "before")

    @property
    def projected_per_frame(self) -> int | None:
        return int(self.side // self.model.config.spatial_pool_stride) ** 2

    def describe(self, kind: Kind, arguments: dict[str, Any], output: Any) -> VisionContext:
        if kind == "image":
            return self.describe_images(arguments)
        return self.describe_videos(arguments, self.backbone.vision_resampler, newline=False)
