"""tiny-internvl: InternVL with tiles and a thumbnail, a class token and pixel shuffle; pictures only.

Tiles of 84 px make 144 patches and 36 tokens each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

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
from vtc.eval.tiny.vocabulary import EXTENDED, IMAGE, TOKEN, VIDEO, VISION_END, VISION_START

TILE, PATCH = 84, 7  # px
MAX_TILES = 4
_SHUFFLED = 2  # patches per side of a token


@dataclass(frozen=True)
class InternVL:
    """Sizes of the two transformers."""

    hidden: int = 128
    vision_layers: int = 4
    vision_inner: int = 384
    text_layers: int = 12
    text_inner: int = 320
    heads: int = 4
    key_heads: int = 2
    grid = TILE // PATCH // _SHUFFLED
    has_classes = True
    media = ("image", "images")

    @property
    def width(self) -> int:
        """Of what the projector reads: the patches of a token side by side."""
        return self.hidden * _SHUFFLED**2

    def build(self, attention: str = "sdpa") -> Any:
        """Fresh weights; the sine code of `sine_positions` is added to the position embedding of the patches."""
        config = InternVLConfig(
            vision_config=InternVLVisionConfig(
                hidden_size=self.hidden,
                intermediate_size=self.vision_inner,
                num_hidden_layers=self.vision_layers,
                num_attention_heads=self.heads,
                image_size=[TILE, TILE],
                patch_size=[PATCH, PATCH],
                layer_scale_init_value=1.0,
                attention_bias=True,
            ),
            text_config=Qwen2Config(
                **text_settings(self.hidden, self.text_inner, self.text_layers, self.heads, self.key_heads)
            ),
            image_token_id=TOKEN[IMAGE],
            image_seq_length=self.grid**2,
            downsample_ratio=1 / _SHUFFLED,
            tie_word_embeddings=False,
        )
        config._attn_implementation = attention
        model = with_generation_settings(InternVLForConditionalGeneration(config))
        with torch.no_grad():
            table = self.tower(model).embeddings.position_embeddings
            table.normal_(std=0.02)
            table[:, 1:] += sine_positions(self.hidden, TILE // PATCH)
            self.tower(model).embeddings.cls_token.normal_(std=0.02)
        return model

    def tower(self, model: Any) -> Any:
        """With the class token."""
        return model.model.vision_tower

    def layers(self, model: Any) -> Any:
        """Of the tower."""
        return self.tower(model).encoder.layer

    def speed_up(self, model: Any) -> None:
        """Nothing is slow."""

    def processor(self) -> Any:
        """One to four tiles and, where there are several, the thumbnail behind them."""
        pixels = pixel_settings(TILE)
        tokenizer = build_tokenizer(
            EXTENDED,
            SPECIAL,
            start_image_token=VISION_START,
            end_image_token=VISION_END,
            context_image_token=IMAGE,
            video_token=VIDEO,
        )
        return InternVLProcessor(
            GotOcr2ImageProcessor(crop_to_patches=True, min_patches=1, max_patches=MAX_TILES, **pixels),
            tokenizer,
            InternVLVideoProcessor(**pixels),
            image_seq_length=self.grid**2,
            chat_template=chat_template(),
        )

    def views(self, media: Media, count: int, size: tuple[int, int]) -> list[View]:
        """The tiles of every picture, row by row, then its thumbnail."""
        height, width = size
        columns, rows = get_optimal_tiled_canvas(size, (TILE, TILE), 1, MAX_TILES)
        x, y = width / columns, height / rows
        boxes = [(c * x, r * y, (c + 1) * x, (r + 1) * y) for r in range(rows) for c in range(columns)]
        if len(boxes) > 1:
            boxes.append((0.0, 0.0, float(width), float(height)))
        return [View((number,), box, self.grid, self.grid) for number in range(count) for box in boxes]

    def see(self, model: Any, media: Media, inputs: dict[str, Tensor]) -> Seen:
        """What the projector reads and writes, and the class token of the last layer."""
        tower = self.tower(model)
        with Recorder(model.model.multi_modal_projector) as read, Recorder(tower.layernorm, output=True) as last:
            output = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
        return Seen(output.pooler_output.flatten(0, 1), read.value, last.value[:, 0])

    def positions(self, model: Any, ids: Tensor, media: Media, inputs: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """One count over the sequence."""
        return counted(ids.shape[1], offsets)
