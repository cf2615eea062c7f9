"""Tiny LLaVA with a CLIP, a SigLIP or a DINOv2 tower."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from vtc.method.layout import Kind
from vtc.testing.family import IMAGE, Piece, TinyModel, concatenate, text_settings

SIDE, PATCH = 28, 7
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}

_NARROW = {name: value for name, value in TOWER.items() if name != "intermediate_size"}


def _build(tower: str, layers: int) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        Dinov2Config,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    whole: dict[str, Any] = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    vision, settings = {
        "clip": (CLIPVisionConfig(**TOWER), {}),
        "siglip": (SiglipVisionConfig(**TOWER), whole),
        # Its positions are those of larger pictures, as in released checkpoints, and are interpolated in every call.
        "dinov2": (Dinov2Config(**(_NARROW | {"image_size": SIDE + 2 * PATCH}), mlp_ratio=2), {}),
    }[tower]
    text = LlamaConfig(**text_settings(layers))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **settings)
    return LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def _piece(model: Any, kind: Kind, generator: torch.Generator, number: int, total: int) -> Piece:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return Piece(kind, [IMAGE] * (SIDE // PATCH) ** 2, {"pixel_values": pixels})


MODELS = {
    f"llava-{tower}": TinyModel("llava", functools.partial(_build, tower), ("image",), _piece, concatenate)
    for tower in ("clip", "siglip", "dinov2")
}
