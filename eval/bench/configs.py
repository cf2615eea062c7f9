"""Hugging Face configurations of published shapes, one function per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vtc.cost.published import PUBLISHED
from vtc.cost.shapes import LLMShape, ModelShape, ProjectorShape, TowerShape
from vtc.eval.bench.processors import TOKENS

SMALL = "small-llava"
SHAPES: Mapping[str, ModelShape] = {
    **PUBLISHED,
    SMALL: ModelShape(
        SMALL, LLMShape(512, 1376, 8, 8, 8, 64, 256), TowerShape(64, 128, 4, 64, 3 * 14**2, prefix=1),
        ProjectorShape(64, 512, 512, cut=1), 576, 576, "no published model: for a CPU, in minutes",
    ),
}  # fmt: skip
"""By name. The small one has LLaVA-1.5's 576 tokens; its tower is shallow, so that it is about the language model."""


def config(shape: ModelShape) -> Any:
    """The Hugging Face configuration with these sizes, from which `adapters.shape_of` reads them again."""
    made = _BUILDERS[family(shape)](shape)
    made.architectures = [_CLASSES[family(shape)]]
    return made


def family(shape: ModelShape) -> str:
    """The family of a published shape, by its name."""
    for prefix in _BUILDERS:
        if shape.name.startswith(prefix):
            return prefix
    return "llava-1.5"


def _text(shape: ModelShape) -> dict[str, Any]:
    llm = shape.llm
    return {
        "vocab_size": llm.vocabulary,
        "hidden_size": llm.hidden,
        "intermediate_size": llm.intermediate,
        "num_hidden_layers": llm.layers,
        "num_attention_heads": llm.heads,
        "num_key_value_heads": llm.kv_heads,
        "head_dim": llm.head_dim,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": TOKENS["begin"],
        "eos_token_id": TOKENS["end"],
        "pad_token_id": TOKENS["pad"],
    }


def _decoder(shape: ModelShape) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    settings = _text(shape)
    if shape.llm.kind == "qwen2":
        settings.pop("head_dim")  # always hidden / heads there
        return Qwen2Config(**settings)
    return LlamaConfig(**settings)


def _tower(shape: ModelShape, side: int, heads: int, layers: int | None = None) -> dict[str, Any]:
    tower = shape.tower
    return {
        "hidden_size": tower.hidden,
        "intermediate_size": tower.intermediate,
        "num_hidden_layers": tower.layers if layers is None else layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": 14,
    }


def _llava(shape: ModelShape) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(**_tower(shape, 336, max(4, shape.tower.hidden // 64)))
    return LlavaConfig(
        vision_config=vision, text_config=_decoder(shape), image_token_index=TOKENS["image"], vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


PINPOINTS = {
    "llava-next": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "llava-onevision": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
}


def _next(shape: ModelShape) -> Any:
    from transformers import CLIPVisionConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(shape, 336, 16)), text_config=_decoder(shape),
        image_token_index=TOKENS["image"], image_grid_pinpoints=PINPOINTS["llava-next"], vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip


def _onevision(shape: ModelShape) -> Any:
    from transformers import LlavaOnevisionConfig, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(shape, 384, 16), vision_use_head=False), text_config=_decoder(shape),
        image_token_index=TOKENS["image"], video_token_index=TOKENS["video"], vision_feature_layer=-1,
        image_grid_pinpoints=PINPOINTS["llava-onevision"], vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9", tie_word_embeddings=False,
    )  # fmt: skip


def _qwen_tokens() -> dict[str, Any]:
    return {
        "image_token_id": TOKENS["image"], "video_token_id": TOKENS["video"], "tie_word_embeddings": False,
        "vision_start_token_id": TOKENS["vision_start"], "vision_end_token_id": TOKENS["vision_end"],
    }  # fmt: skip


def _rope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section, **more}}


def _qwen2(shape: ModelShape) -> Any:
    from transformers import Qwen2VLConfig

    tower, text = shape.tower, {**_text(shape), **_rope([16, 24, 24])}
    text.pop("head_dim")
    vision = {
        "depth": tower.layers, "embed_dim": tower.hidden, "hidden_size": shape.llm.hidden, "num_heads": 16,
        "mlp_ratio": tower.intermediate // tower.hidden, "patch_size": 14,
    }  # fmt: skip
    return Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_tokens())


def _qwen25(shape: ModelShape) -> Any:
    from transformers import Qwen2_5_VLConfig

    tower, text = shape.tower, {**_text(shape), **_rope([16, 24, 24])}
    text.pop("head_dim")
    vision = {
        "depth": tower.layers, "hidden_size": tower.hidden, "intermediate_size": tower.intermediate, "num_heads": 16,
        "out_hidden_size": shape.llm.hidden, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": list(tower.full or ()), "tokens_per_second": 2,
    }  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_tokens())


def _qwen3(shape: ModelShape) -> Any:
    from transformers import Qwen3VLConfig

    tower = shape.tower
    last = tower.layers - 3  # deep features come from evenly spaced layers
    vision = {
        "depth": tower.layers, "hidden_size": tower.hidden, "intermediate_size": tower.intermediate, "num_heads": 16,
        "out_hidden_size": shape.llm.hidden, "patch_size": 16, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [last // 3 + 1, 2 * last // 3 + 1, last],
    }  # fmt: skip
    text = {**_text(shape), **_rope([24, 20, 20], mrope_interleaved=True)}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_tokens())


def _internvl(shape: ModelShape) -> Any:
    from transformers import InternVLConfig, InternVLVisionConfig

    sides = _tower(shape, 448, 16) | {"image_size": [448, 448], "patch_size": [14, 14]}
    return InternVLConfig(
        vision_config=InternVLVisionConfig(**sides, attention_bias=True), text_config=_decoder(shape),
        image_token_id=TOKENS["image"], image_seq_length=256, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip


_BUILDERS: Mapping[str, Callable[[ModelShape], Any]] = {
    "llava-1.5": _llava, "llava-next": _next, "llava-onevision": _onevision, "qwen2-vl": _qwen2, "qwen2.5-vl": _qwen25,
    "qwen3-vl": _qwen3, "internvl": _internvl,
}  # fmt: skip
_CLASSES = {
    "llava-1.5": "LlavaForConditionalGeneration",
    "llava-next": "LlavaNextForConditionalGeneration",
    "llava-onevision": "LlavaOnevisionForConditionalGeneration",
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
