"""Tiny InternVL: images of several tiles and of one, between the marks that its processor writes; counted frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtc.method.layout import Kind
from vtc.testing.family import IMAGE, VISION_END, VISION_START, Piece, TinyModel, concatenate, text_settings

SIDE, PATCH, TILES = 32, 4, (3, 1, 5)
TILE_TOKENS = (SIDE // PATCH // 2) ** 2
FRAMES, MOST_FRAMES = (2, 4, 3), 8
LINE, FRAME, COLON, NUMBERS = 110, 111, 112, 20  # ids of "\n", "Frame", ": " and of the number 0


def _build(layers: int) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH, PATCH],
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text_settings(layers)),
        image_token_id=IMAGE,
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
    )
    config.video_frame_texts = [[VISION_END, LINE, *_counted(number)] for number in range(2, MOST_FRAMES + 1)]
    return InternVLForConditionalGeneration(config)  # type: ignore[no-any-return]


def _counted(number: int) -> list[int]:
    return [FRAME, NUMBERS + number, COLON, VISION_START]


def _piece(model: Any, kind: Kind, generator: torch.Generator, number: int, total: int) -> Piece:
    if kind == "video":
        frames = FRAMES[int(torch.randint(len(FRAMES), (), generator=generator))]
        pixels = torch.randn(frames, 3, SIDE, SIDE, generator=generator)
        texts = [[*_counted(frame), *[IMAGE] * TILE_TOKENS, VISION_END] for frame in range(1, frames + 1)]
        ids = [i for frame, text in enumerate(texts) for i in ([LINE, *text] if frame else text)]
        return Piece(kind, ids, {"pixel_values": pixels})
    tiles = TILES[int(torch.randint(len(TILES), (), generator=generator))]
    pixels = torch.randn(tiles, 3, SIDE, SIDE, generator=generator)
    ids = [VISION_START, *[IMAGE] * (tiles * TILE_TOKENS), VISION_END]
    return Piece(kind, ids, {"pixel_values": pixels})


MODELS = {"internvl": TinyModel("internvl", _build, ("image", "video"), _piece, concatenate)}
