"""Whole models around a vision tower in a case's sizes, with random weights and a projector that changes nothing."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE, VIDEO, TEXT, START = 7, 6, 3, 5
FAMILIES = {
    "llava": ("Llava", "CLIPVision"),
    "llava-next": ("LlavaNext", "CLIPVision"),
    "llava-next-video": ("LlavaNextVideo", "CLIPVision"),
    "llava-onevision": ("LlavaOnevision", "SiglipVision"),
}


def build(
    family: str, side: int, width: int, *, patch: int = 1, layers: int = 24, heads: int = 1, llm: int = 1, **more: Any
) -> Any:
    """A LLaVA of square crops of side x side patches and an LLM of `llm` layers that is `width` wide, in float32.

    layers, heads: of the tower, whose rows are as wide as the LLM's. more: of the model's configuration.
    """
    whole, tower = FAMILIES[family]
    sizes = {"hidden_size": width, "intermediate_size": 16}
    vision = getattr(transformers, f"{tower}Config")(
        **sizes, num_hidden_layers=layers, num_attention_heads=heads, image_size=side * patch, patch_size=patch
    )
    config = getattr(transformers, f"{whole}Config")(
        vision_config=vision, text_config=_llm(transformers.LlamaConfig, width, llm), image_token_index=IMAGE, **more
    )
    model = made(getattr(transformers, f"{whole}ForConditionalGeneration"), config)
    model.model.multi_modal_projector = nn.Identity()
    return model


def qwen(layers: int, full: tuple[int, ...], heads: int) -> Any:
    """A Qwen2.5-VL with windows of 112 pixels in all encoder layers but `full`."""
    vision = {
        "depth": layers, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "num_heads": heads,
        "fullatt_block_indexes": list(full), "tokens_per_second": 2,
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"num_key_value_heads": 1, "vocab_size": 8}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text | rope, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=4,
    )  # fmt: skip
    return made(transformers.Qwen2_5_VLForConditionalGeneration, config)


def prompt(tokens: int, rows: int = 1, *, before: int = 1, after: int = 1, token: int = IMAGE) -> dict[str, Tensor]:
    """Ids of `rows` prompts with one item of so many tokens between two texts."""
    ids = torch.tensor([TEXT] * before + [token] * tokens + [TEXT] * after)
    return {"input_ids": ids.expand(rows, -1).clone()}


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def pass_through(layers: Any) -> None:
    """Let what enters the layers leave them unchanged."""
    for layer in layers:
        for name, module in layer.named_modules():
            if name.endswith(("o_proj", "out_proj", "fc2", "down_proj")):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)


def _llm(kind: Any, width: int, layers: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 1}
    return kind(**sizes, vocab_size=8, pad_token_id=None, bos_token_id=1, eos_token_id=2)


def made(kind: Any, config: Any) -> Any:
    """A random model in float32, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval().float()
    model.set_attn_implementation("sdpa")
    return model
