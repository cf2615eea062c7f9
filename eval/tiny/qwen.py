"""tiny-qwen: Qwen2.5-VL with window attention, dynamic resolution and rotary positions in three dimensions.

A picture of 168 px has 144 tokens of 14 px, two frames of 84 px have 36.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from vtc.eval.tiny.batches import PIXEL_MEAN, PIXEL_STD
from vtc.eval.tiny.family import SPECIAL, Seen, View, chat_template, text_settings, with_generation_settings
from vtc.eval.tiny.model import plain_attention
from vtc.eval.tiny.processor import build_tokenizer
from vtc.eval.tiny.sample import Media
from vtc.eval.tiny.vocabulary import EXTENDED, IMAGE, TOKEN, VIDEO, VISION_END, VISION_START

PATCH, MERGE, FRAMES = 7, 2, 2  # px, patches per side of a token, frames per patch
CELL = PATCH * MERGE
WINDOW = 3 * CELL  # px
# The processor takes clips for 24 frames per second where nothing else is said; a pair of frames is then one position.
# More would set the frames of long clips behind the question, and `generate` continues behind the furthest of both.
TOKENS_PER_SECOND = 12


@dataclass(frozen=True)
class Qwen:
    """Sizes of the two transformers."""

    hidden: int = 128
    vision_layers: int = 4
    vision_inner: int = 256
    text_layers: int = 12
    text_inner: int = 320
    heads: int = 4
    key_heads: int = 2
    theta: float = 30.0
    """Base of the rotary positions. The 6 slowest of a head's 16 frequencies are the columns'; with the usual 10,000
    they turn by at most 0.04 between the first column and the last of 12, and no layer tells left from right."""
    grid = 0  # the tower knows relative positions only
    has_classes = False
    media = ("image", "images", "video")

    @property
    def width(self) -> int:
        """Of what the merger writes."""
        return self.hidden

    def build(self, attention: str = "sdpa") -> Any:
        """Fresh weights; every second layer of the tower, and the last, attends beyond its window."""
        head = self.hidden // self.heads
        text = text_settings(self.hidden, self.text_inner, self.text_layers, self.heads, self.key_heads)
        sections = [head // 8, *[(head // 2 - head // 8) // 2] * 2]
        config = Qwen2_5_VLConfig(
            vision_config={
                "depth": self.vision_layers,
                "hidden_size": self.hidden,
                "intermediate_size": self.vision_inner,
                "num_heads": self.heads,
                "out_hidden_size": self.hidden,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": FRAMES,
                "window_size": WINDOW,
                "fullatt_block_indexes": list(range(1, self.vision_layers, 2)),
                "tokens_per_second": TOKENS_PER_SECOND,
            },
            text_config={
                **text,
                "rope_parameters": {"rope_type": "default", "rope_theta": self.theta, "mrope_section": sections},
            },
            image_token_id=TOKEN[IMAGE],
            video_token_id=TOKEN[VIDEO],
            vision_start_token_id=TOKEN[VISION_START],
            vision_end_token_id=TOKEN[VISION_END],
            tie_word_embeddings=False,
        )
        config._attn_implementation = attention
        return with_generation_settings(Qwen2_5_VLForConditionalGeneration(config))

    def tower(self, model: Any) -> Any:
        """With the merger, whose tokens the auxiliary heads read."""
        return model.model.visual

    def layers(self, model: Any) -> Any:
        """None: the tower loops over windows of a length that depends on its input."""
        return ()

    def speed_up(self, model: Any) -> None:
        """Windows of equal length in one batch instead of one by one, and a matrix instead of a convolution."""
        model.model.visual.patch_embed.forward = partial(_embed, model.model.visual.patch_embed)
        for block in model.model.visual.blocks:
            block.attn.forward = partial(_attend, block.attn)

    def processor(self) -> Any:
        """Pictures and clips in their own resolution."""
        pixels = {
            "image_mean": list(PIXEL_MEAN),
            "image_std": list(PIXEL_STD),
            "patch_size": PATCH,
            "temporal_patch_size": FRAMES,
            "merge_size": MERGE,
            "size": {"shortest_edge": CELL**2, "longest_edge": 168 * 252},
        }
        return Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**pixels),
            build_tokenizer(EXTENDED, SPECIAL, image_token=IMAGE, video_token=VIDEO),
            Qwen2VLVideoProcessor(**pixels, cap_pixels_per_frame=False),
            chat_template=chat_template(f"{VISION_START}{IMAGE}{VISION_END}", f"{VISION_START}{VIDEO}{VISION_END}"),
        )

    def views(self, media: Media, count: int, size: tuple[int, int]) -> list[View]:
        """Every picture, or every pair of frames, as a whole."""
        height, width = size
        step = FRAMES if media == "video" else 1
        whole = (0.0, 0.0, float(width), float(height))
        return [
            View(tuple(range(start, min(start + step, count))), whole, height // CELL, width // CELL)
            for start in range(0, count, step)
        ]

    def see(self, model: Any, media: Media, inputs: dict[str, Tensor]) -> Seen:
        """What the merger writes serves both."""
        if media == "video":
            grids = inputs["video_grid_thw"]
            output = model.model.get_video_features(inputs["pixel_values_videos"], grids, return_dict=True)
        else:
            grids = inputs["image_grid_thw"]
            output = model.model.get_image_features(inputs["pixel_values"], grids, return_dict=True)
        tokens = torch.cat(output.pooler_output)
        cells = int(grids[0, 1] * grids[0, 2]) // MERGE**2
        return Seen(tokens, tokens.view(-1, cells, tokens.shape[-1]))

    def positions(self, model: Any, ids: Tensor, media: Media, inputs: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """Time, row and column, (3, 1, P + T)."""
        count = int((ids == TOKEN[VISION_START]).sum())
        kinds = (ids == TOKEN[IMAGE]).int() + 2 * (ids == TOKEN[VIDEO]).int()
        grid = inputs["video_grid_thw" if media == "video" else "image_grid_thw"][:count]
        seconds = torch.full((count,), FRAMES / 24)
        grids: dict[str, Any] = (
            {"video_grid_thw": grid, "second_per_grid_ts": seconds} if media == "video" else {"image_grid_thw": grid}
        )
        prefix, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
        text = (prefix[0, 0, -1] + 1 + offsets.to(ids.device)).expand(3, 1, -1)  # behind the end mark, in all three
        return torch.cat([prefix, text], dim=-1)


def _embed(module: Any, pixels: Tensor) -> Tensor:
    return F.linear(pixels.view(len(pixels), -1), module.proj.weight.flatten(1))


def _attend(
    module: Any, states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """Attention within stretches of `states` (tokens, hidden), all stretches of one length at once."""
    tokens = len(states)
    query, key, value = module.qkv(states).reshape(tokens, 3, module.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    lengths, starts = cu_seqlens.diff(), cu_seqlens[:-1]
    mixed = torch.empty_like(value)
    for length in sorted(set(lengths.tolist())):
        rows = starts[lengths == length, None] + torch.arange(length, device=states.device)
        parts = [part[rows].transpose(1, 2) for part in (query, key, value)]
        found, _weights = plain_attention(module, parts[0], parts[1], parts[2], None, module.scaling)
        mixed = mixed.index_put((rows,), found.to(mixed.dtype))
    output: Tensor = module.proj(mixed.reshape(tokens, -1))
    return output
