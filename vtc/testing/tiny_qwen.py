"""Tiny Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE: items of different grids, videos of several frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtc.method.layout import Kind
from vtc.testing.family import (
    HIDDEN,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Piece,
    TinyModel,
    concatenate,
    text_settings,
)

PATCH, MERGE, CHANNELS, PAIR = 4, 2, 3, 2  # PAIR: frames that one temporal patch covers
GRIDS: dict[Kind, tuple[tuple[int, int, int], ...]] = {
    "image": ((1, 8, 6), (1, 4, 4), (1, 6, 10), (1, 10, 4)),
    "video": ((3, 4, 6), (2, 6, 6), (4, 4, 4)),
}
"""Frames, rows and columns of patches an item is drawn from."""

TOWER: dict[str, Any] = {
    "depth": 4,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": PAIR,
    "in_channels": CHANNELS,
}
TOKENS: dict[str, int] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _rope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}}


def _qwen2(layers: int) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {**TOWER, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    text = {**text_settings(layers), **_rope([2, 3, 3])}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration(config)  # type: ignore[no-any-return]


def _qwen25(layers: int) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        **TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": HIDDEN,
        "window_size": 2 * MERGE * PATCH,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    text = {**text_settings(layers), **_rope([2, 3, 3])}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)  # type: ignore[no-any-return]


QWEN3_TOWER: dict[str, Any] = {
    **TOWER,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1, 2],
}


def _qwen3_text(layers: int) -> dict[str, Any]:
    return {**text_settings(layers), "head_dim": 16, **_rope([4, 2, 2], mrope_interleaved=True)}


def _qwen3(layers: int) -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(text_config=_qwen3_text(layers), vision_config=QWEN3_TOWER, **TOKENS)
    return Qwen3VLForConditionalGeneration(config)  # type: ignore[no-any-return]


def _qwen3_moe(layers: int) -> nn.Module:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    text = {**_qwen3_text(layers), **experts, "mlp_only_layers": [1]}  # one layer has no experts
    config = Qwen3VLMoeConfig(text_config=text, vision_config=QWEN3_TOWER, tie_word_embeddings=False, **TOKENS)
    return Qwen3VLMoeForConditionalGeneration(config)  # type: ignore[no-any-return]


def _piece(model: Any, kind: Kind, generator: torch.Generator, number: int, total: int) -> Piece:
    grids = GRIDS[kind]
    frames, height, width = grids[int(torch.randint(len(grids), (), generator=generator))]
    pixels = torch.randn(frames * height * width, CHANNELS * PAIR * PATCH * PATCH, generator=generator)
    grid = torch.tensor([[frames, height, width]])
    tokens = height * width // MERGE**2
    if kind == "image":
        ids = [VISION_START, *[IMAGE] * tokens, VISION_END]
        return Piece(kind, ids, {"pixel_values": pixels, "image_grid_thw": grid})
    tensors = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    if model.config.model_type in ("qwen3_vl", "qwen3_vl_moe"):  # every frame follows its time, written out
        times = torch.randint(5, 110, (frames, 2), generator=generator).tolist()
        return Piece(kind, [i for t in times for i in (*t, VISION_START, *[VIDEO] * tokens, VISION_END)], tensors)
    if model.config.model_type == "qwen2_5_vl":
        tensors["second_per_grid_ts"] = torch.tensor([0.5 + number])
    return Piece(kind, [VISION_START, *[VIDEO] * frames * tokens, VISION_END], tensors)


def _tiny(family: str, build: Any) -> TinyModel:
    return TinyModel(family, build, ("image", "video"), _piece, concatenate, token_types=True)


MODELS = {
    "qwen2-vl": _tiny("qwen2-vl", _qwen2),
    "qwen2.5-vl": _tiny("qwen2.5-vl", _qwen25),
    "qwen3-vl": _tiny("qwen3-vl", _qwen3),
    "qwen3-vl-moe": _tiny("qwen3-vl", _qwen3_moe),
}
