"""Tiny LLaVA with a CLIP or a SigLIP tower."""

from __future__ import annotations

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


def _build(tower: str, layers: int) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    text = LlamaConfig(**text_settings(layers))
    if tower == "clip":
        config = LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_index=IMAGE)
    else:
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(**TOWER),
            text_config=text,
            image_token_index=IMAGE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    return LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def _piece(model: Any, kind: Kind, generator: torch.Generator, number: int, total: int) -> Piece:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return Piece(kind, [IMAGE] * (SIDE // PATCH) ** 2, {"pixel_values": pixels})


MODELS = {
    "llava-clip": TinyModel("llava", lambda layers: _build("clip", layers), ("image",), _piece, concatenate),
    "llava-siglip": TinyModel("llava", lambda layers: _build("siglip", layers), ("image",), _piece, concatenate),
}
