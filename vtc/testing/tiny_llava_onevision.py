"""Tiny LLaVA-OneVision: tiled images, some of which the packing shrinks, prompts of several images, videos."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc.method.layout import Kind
from vtc.testing.family import IMAGE, VIDEO, Piece, TinyModel, text_settings
from vtc.testing.tiny_llava import PATCH, SIDE, TOWER
from vtc.testing.tiny_llava_next import FRAMES, anyres_tensors, collate, feature_count

PINPOINTS = [[SIDE * rows, SIDE * cols] for rows, cols in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4))]
SIZES: tuple[tuple[int, int], ...] = (
    (100, 110),
    (40, 50),
    (28, 60),
    (80, 62),
    (25, 25),
)  # pixels; the first and fourth exceed four crops


def _build(layers: int) -> nn.Module:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=Qwen2Config(**text_settings(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
    )
    return LlavaOnevisionForConditionalGeneration(config)  # type: ignore[no-any-return]


@contextmanager
def unshrunk() -> Iterator[None]:
    """Inside, no picture is so large that the packing resizes its map of patches."""
    global SIZES
    before, SIZES = SIZES, SIZES[1:3] + SIZES[4:]
    try:
        yield
    finally:
        SIZES = before


def _piece(model: Any, kind: Kind, generator: torch.Generator, number: int, total: int) -> Piece:
    if kind == "video":
        pixels = torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=generator)
        return Piece(kind, [VIDEO] * (FRAMES * (SIDE // PATCH // 2) ** 2 + 1), {"pixel_values_videos": pixels})
    tensors = anyres_tensors(model, SIZES, generator, tiled=total == 1)
    count = (SIDE // PATCH) ** 2 + 1 if total > 1 else feature_count(model, tensors)
    return Piece(kind, [IMAGE] * count, tensors)


def _collate(rows: list[list[Piece]]) -> dict[str, Tensor]:
    joined = collate(rows)
    counts = [sum(piece.kind == "image" for piece in row) for row in rows]
    if any(counts):
        joined["batch_num_images"] = torch.tensor([count for count in counts if count])
    return joined


MODELS = {"llava-onevision": TinyModel("llava-onevision", _build, ("image", "video"), _piece, _collate)}
