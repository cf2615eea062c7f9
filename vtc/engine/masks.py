"""Attention masks of the rows that are left, as the language model and its layers take them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vtc.engine.llm_pass import LLMPass
from vtc.errors import UnsupportedCall
from vtc.ops.attention import soft_mask


def attention_of(config: Any) -> str:
    """Name of the attention implementation that a configuration runs."""
    return config._attn_implementation or ""


def model_mask(config: Any, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """A 2D mask as the model takes it; for one new token under SDPA the finished 4D mask, which saves a sync."""
    if mask is None or hidden.shape[1] > 1 or attention_of(config) != "sdpa":
        return mask
    return mask[:, None, None, :]


def group_mask(config: Any, one: LLMPass, index: int, mask: Tensor | None, hidden: Tensor) -> Any:
    """What the layers from `index` on take as attention mask; additive [B, 1, L, L] under soft masks."""
    weights = one.now.rows.weights
    if weights is not None and attention_of(config) not in ("sdpa", "eager"):
        raise UnsupportedCall(
            f"soft masks need attention that takes an additive mask, not {attention_of(config)!r}; load the model "
            "with attn_implementation='sdpa'"
        )
    causal = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=model_mask(config, mask, hidden),
        past_key_values=one.cache,
        position_ids=None,
        layer_idx=index,
    )
    return causal if weights is None else soft_mask(weights, causal, hidden.dtype)
