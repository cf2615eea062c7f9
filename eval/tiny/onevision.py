"""tiny-onevision: LLaVA-OneVision with AnyRes crops, several pictures per prompt, and clips.

Tiles of 84 px make 36 tokens each, so that a picture of 168 px has 36 + 144 + 12 newlines, a clip 9 tokens per frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import select_best_resolution

from vtc.eval.tiny.family import (
    SPECIAL,
    Recorder,
    Seen,
    View,
    chat_template,
    counted,
    pixel_settings,
    text_settings,
    with_generation_settings,
)
from vtc.eval.tiny.model import sine_positions
from vtc.eval.tiny.processor import build_tokenizer
from vtc.eval.tiny.sample import Media
from vtc.eval.tiny.vocabulary import EXTENDED, IMAGE, TOKEN, VIDEO

TILE, PATCH = 84, 14  # px
PINPOINTS = [[TILE * rows, TILE * columns] for rows, columns in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


@dataclass(frozen=True)
class OneVision:
    """Sizes of the two transformers."""

    hidden: int = 128
    vision_layers: int = 5
    vision_inner: int = 512
    text_layers: int = 12
    text_inner: int = 320
    heads: int = 4
    key_heads: int = 2
    grid = TILE // PATCH
    has_classes = False
    media = ("image", "images", "video")

    @property
    def width(self) -> int:
        """Of what the projector reads."""
        return self.hidden

    def config(self) -> Any:
        """Configuration of a OneVision that reads the last layer of its tower, as the released ones do."""
        vision = SiglipVisionConfig(
            hidden_size=self.hidden,
            intermediate_size=self.vision_inner,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.heads,
            image_size=TILE,
            patch_size=PATCH,
            vision_use_head=False,
        )
        text = Qwen2Config(**text_settings(self.hidden, self.text_inner, self.text_layers, self.heads, self.key_heads))
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=TOKEN[IMAGE],
            video_token_index=TOKEN[VIDEO],
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            tie_word_embeddings=False,
        )

    def build(self, attention: str = "sdpa") -> Any:
        """Fresh weights; the sine code of `sine_positions` is added to the position embedding."""
        config = self.config()
        config._attn_implementation = attention
        model = with_generation_settings(LlavaOnevisionForConditionalGeneration(config))
        with torch.no_grad():
            embeddings = self.tower(model).embeddings
            embeddings.position_embedding.weight += sine_positions(self.hidden, self.grid)
        return model

    def tower(self, model: Any) -> Any:
        """SigLIP without its pooling head."""
        return model.model.vision_tower

    def layers(self, model: Any) -> Any:
        """Of SigLIP."""
        return self.tower(model).encoder.layers

    def speed_up(self, model: Any) -> None:
        """Nothing is slow."""

    def processor(self) -> Any:
        """AnyRes images, clips of all their frames, and LLaVA's chat template."""
        pixels = pixel_settings(TILE)
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(image_grid_pinpoints=PINPOINTS, **pixels),
            build_tokenizer(EXTENDED, SPECIAL),
            LlavaOnevisionVideoProcessor(**pixels),
            num_image_tokens=self.grid**2,
            vision_feature_select_strategy="full",
            chat_template=chat_template(),
        )

    def views(self, media: Media, count: int, size: tuple[int, int]) -> list[View]:
        """The overview and the tiles of a single picture; else every picture or frame as a whole."""
        height, width = size
        whole = (0.0, 0.0, float(width), float(height))
        if media != "image":
            return [View((number,), whole, self.grid, self.grid) for number in range(count)]
        rows, columns = select_best_resolution(size, PINPOINTS)
        scale = min(rows / height, columns / width)
        side = TILE / scale
        left, top = (width - columns / scale) / 2, (height - rows / scale) / 2
        tiles = [
            (left + c * side, top + r * side, left + (c + 1) * side, top + (r + 1) * side)
            for r in range(rows // TILE)
            for c in range(columns // TILE)
        ]
        return [View((0,), box, self.grid, self.grid) for box in (whole, *tiles)]

    def see(self, model: Any, media: Media, inputs: dict[str, Tensor]) -> Seen:
        """What the projector reads, and what the packing of the class makes of what it writes."""
        with Recorder(model.model.multi_modal_projector) as read:
            if media == "video":
                output = model.model.get_video_features(inputs["pixel_values_videos"], return_dict=True)
                return Seen(output.pooler_output.flatten(0, 1), read.value)
            output = model.model.get_image_features(
                inputs["pixel_values"],
                inputs["image_sizes"],
                batch_num_images=inputs["batch_num_images"],
                return_dict=True,
            )
            return Seen(torch.cat(output.pooler_output), read.value)

    def positions(self, model: Any, ids: Tensor, media: Media, inputs: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """One count over the sequence."""
        return counted(ids.shape[1], offsets)
