"""Sizes from Hugging Face configurations: what the families' `shape` have in common."""

from __future__ import annotations

from typing import Any

from vtc.cost.shapes import Experts, LLMShape, TowerShape


def llm_shape(config: Any) -> LLMShape:
    """The decoder stack of a model with this configuration."""
    text = config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    return LLMShape(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        kind=text.model_type,
        experts=_experts(text, layers),
    )


def _experts(text: Any, layers: int) -> Experts | None:
    count = getattr(text, "num_experts", None)
    if not count:
        return None
    step, without = getattr(text, "decoder_sparse_step", 1) or 1, getattr(text, "mlp_only_layers", None) or ()
    dense = frozenset(layer for layer in range(layers) if layer in without or (layer + 1) % step)
    return Experts(count, text.num_experts_per_tok, text.moe_intermediate_size, dense)


def tower_shape(vision: Any, *, patch: int, prefix: int = 0, pooling: bool = False) -> TowerShape:
    """A tower whose configuration names its sizes as CLIP's or DINOv2's does; patch: pixels in a patch."""
    intermediate, matrices = _feed_forward(vision)
    return TowerShape(
        hidden=vision.hidden_size,
        intermediate=intermediate,
        layers=vision.num_hidden_layers,
        inner=vision.hidden_size,
        inputs=patch * getattr(vision, "num_channels", 3),
        matrices=matrices,
        prefix=prefix,
        pooling=pooling,
    )


def _feed_forward(vision: Any) -> tuple[int, int]:
    """Width and number of matrices of a tower's feed-forward part; DINOv2 names neither."""
    if (named := getattr(vision, "intermediate_size", None)) is not None:
        return named, 2
    width = int(vision.hidden_size * vision.mlp_ratio)
    return ((int(width * 2 / 3) + 7) // 8 * 8, 3) if vision.use_swiglu_ffn else (width, 2)
