"""Tiny random models of every family, built from configurations alone, and raw inputs for them.

Weights are drawn much larger than usual, so that attention is far from uniform in every tower and an error in masks or
positions moves the logits by whole units instead of drowning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

IMAGE, PAD, BOS, VOCABULARY = 120, 0, 1, 128
HIDDEN, LAYERS, SIDE, PATCH = 64, 4, 28, 7

Part = int | Literal["image", "video"]
"""A piece of a prompt: so many random text tokens, or one visual item."""


@dataclass(frozen=True)
class TinyModel:
    """How to build one tiny model. tokens: LLM tokens of one image."""

    family: str
    build: Callable[[int], nn.Module]
    tokens: int


def _llama(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )


def _llava(tower: str, layers: int) -> nn.Module:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    if tower == "clip":
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**size), text_config=_llama(layers), image_token_index=IMAGE
        )
    else:
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(**size),
            text_config=_llama(layers),
            image_token_index=IMAGE,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    return LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


TINY_MODELS: dict[str, TinyModel] = {
    "llava-clip": TinyModel("llava", lambda layers: _llava("clip", layers), (SIDE // PATCH) ** 2),
    "llava-siglip": TinyModel("llava", lambda layers: _llava("siglip", layers), (SIDE // PATCH) ** 2),
}


def tiny_model(name: str, *, attn_implementation: str = "sdpa", layers: int = LAYERS, seed: int = 0) -> Any:
    """Build the tiny model `name` in float32 on the CPU; the same seed gives the same weights."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: Any = TINY_MODELS[name].build(layers).eval().float()
    finally:
        torch.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed + 1)
    for key, weight in model.named_parameters():
        draw = torch.randn(weight.shape, generator=generator)
        if "class_embedding" in key or "embed" in key:
            weight.data.copy_(0.5 * draw)
        elif weight.ndim >= 2:
            weight.data.copy_(draw * (1.6 / weight[0].numel() ** 0.5))
        elif key.endswith("bias"):
            weight.data.copy_(0.2 * draw)
    model.set_attn_implementation(attn_implementation)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def tiny_inputs(
    name: str,
    layout: Sequence[Sequence[Part]],
    *,
    seed: int = 0,
    padding: Literal["left", "right"] = "left",
    extra: int = 0,
) -> dict[str, Tensor]:
    """Inputs for `tiny_model(name)`: one row per entry of `layout`, each a list of parts, padded to one length.

    extra: padding tokens added to every row. The pixels of an item depend on `seed` and its number only.

    Example: ``tiny_inputs("llava-clip", [[3, "image", 5], [2, "image", 9, "image"], [7]])``
    """
    text = torch.Generator().manual_seed(seed)
    images: list[Tensor] = []
    rows: list[list[int]] = []
    for parts in layout:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids += torch.randint(5, 110, (part,), generator=text).tolist()
            else:
                generator = torch.Generator().manual_seed(1000 * seed + len(images))
                images.append(torch.randn(3, SIDE, SIDE, generator=generator))
                ids += [IMAGE] * TINY_MODELS[name].tokens
        rows.append(ids)
    length = max(map(len, rows)) + extra
    input_ids = torch.full((len(rows), length), PAD)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    for row, ids in enumerate(rows):
        place = slice(length - len(ids), length) if padding == "left" else slice(0, len(ids))
        input_ids[row, place] = torch.tensor(ids)
        attention_mask[row, place] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if images:
        inputs["pixel_values"] = torch.stack(images)
    return inputs


def single_row(inputs: dict[str, Tensor], layout: Sequence[Sequence[Part]], row: int) -> dict[str, Tensor]:
    """Row `row` of a `tiny_inputs` batch as a batch of its own, without padding."""
    mask = inputs["attention_mask"][row].bool()
    before = sum(not isinstance(part, int) for parts in layout[:row] for part in parts)
    count = sum(not isinstance(part, int) for part in layout[row])
    alone = {"input_ids": inputs["input_ids"][row, mask][None], "attention_mask": torch.ones(1, int(mask.sum())).long()}
    if count:
        alone["pixel_values"] = inputs["pixel_values"][before : before + count]
    return alone
