"""Tiny LLaVA-NeXT and LLaVA-NeXT-Video: images of many shapes, so tilings, margins and newlines differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtc.method.layout import Kind
from vtc.testing.family import IMAGE, VIDEO, Piece, TinyModel, concatenate, text_settings
from vtc.testing.tiny_llava import SIDE, TOWER

FRAMES = 3
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
SIZES = ((40, 50), (30, 70), (90, 20), (56, 56), (50, 33))  # pixels, (height, width) of the picture before tiling


def _build(video: bool, layers: int) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    parts: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**TOWER),
        "text_config": LlamaConfig(**text_settings(layers)),
        "image_token_index": IMAGE,
        "image_grid_pinpoints": PINPOINTS,
    }
    if video:
        config = LlavaNextVideoConfig(**parts, video_token_index=VIDEO, spatial_pool_mode="average")
        return LlavaNextVideoForConditionalGeneration(config)  # type: ignore[no-any-return]
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**parts))  # type: ignore[no-any-return]


def _piece(model: Any, kind: Kind, generator: torch.Generator, number: int, total: int) -> Piece:
    if kind == "video":
        pixels = torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=generator)
        return Piece(kind, [VIDEO] * (FRAMES * 4), {"pixel_values_videos": pixels})
    tensors = anyres_tensors(model, SIZES, generator)
    return Piece(kind, [IMAGE] * feature_count(model, tensors), tensors)


def anyres_tensors(
    model: Any, sizes: Sequence[tuple[int, int]], generator: torch.Generator, *, tiled: bool = True
) -> dict[str, Tensor]:
    """One image of one of the `sizes`: pixel_values [1, crops, 3, SIDE, SIDE] and image_sizes [1, 2]."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
    crops = image_size_to_num_patches(size, model.config.image_grid_pinpoints, SIDE) if tiled else 1
    pixels = torch.randn(1, crops, 3, SIDE, SIDE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


@torch.no_grad()
def feature_count(model: Any, tensors: dict[str, Tensor]) -> int:
    """Tokens that the model itself makes of one image."""
    function = type(model.model).get_image_features  # behind any wrapper on the instance
    pixels = tensors["pixel_values"].to(model.dtype)
    return len(function(model.model, **{**tensors, "pixel_values": pixels}, return_dict=True).pooler_output[0])


def collate(rows: list[list[Piece]]) -> dict[str, Tensor]:
    """Join the pieces' tensors, images padded with empty crops to the largest number of them."""
    most = max((p.tensors["pixel_values"].shape[1] for row in rows for p in row if p.kind == "image"), default=0)
    return concatenate([[_padded(piece, most) for piece in row] for row in rows])


def _padded(piece: Piece, crops: int) -> Piece:
    if piece.kind == "video":
        return piece
    pixels = piece.tensors["pixel_values"]
    padding = (0, 0, 0, 0, 0, 0, 0, crops - pixels.shape[1])
    return Piece(piece.kind, piece.ids, {**piece.tensors, "pixel_values": torch.nn.functional.pad(pixels, padding)})


MODELS = {
    "llava-next": TinyModel("llava-next", lambda layers: _build(False, layers), ("image",), _piece, collate),
    "llava-next-video": TinyModel(
        "llava-next-video", lambda layers: _build(True, layers), ("image", "video"), _piece, collate
    ),
}
