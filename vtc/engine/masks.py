"""Attention masks of the rows that are left, as the language model and its layers take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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


def first_mask(config: Any, one: LLMPass, mask: Tensor | None, hidden: Tensor) -> Any:
    """What the model takes; it makes masks of its own of a 2D one, and none where the rows need another."""
    if one.now.rows.near is None:
        return model_mask(config, mask, hidden)
    return group_mask(config, one, 0, mask, hidden)


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Batch row, head, query and key, numbers all of them -> whether the query may attend to the key."""


def near_rule(visual: Tensor, near: Tensor, past: int) -> Rule:
    """Visual queries attend to text, to themselves and to visual keys that are near; behind `past` cached rows.

    visual: [B, L], near: [C, B, L], see `RowTable`. What an earlier call left in the cache is seen.
    """
    pad = torch.nn.functional.pad
    visual, near = pad(visual, (past, 0)), pad(near, (past, 0))

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = ~visual[batch, query] | ~visual[batch, key] | (query == key)
        close = torch.ones_like(seen)
        for numbers in near:  # one by one: each takes as much memory as a mask of floats
            close = close & ((numbers[batch, query] - numbers[batch, key]).abs() <= 1)
        return seen | close

    return rule


def group_mask(config: Any, one: LLMPass, index: int, mask: Tensor | None, hidden: Tensor) -> Any:
    """What the layers from `index` on take as attention mask; additive [B, 1, L, L] under soft masks."""
    rows, kind = one.now.rows, attention_of(config)
    weights, rule = rows.weights, None
    if rows.near is not None and rows.visual is not None:
        if kind not in ("sdpa", "eager", "flex_attention"):
            raise UnsupportedCall(
                f"what visual tokens see of each other is limited, but {kind!r} attention has no mask for that; load "
                "the model with attn_implementation='sdpa'"
            )
        past = 0 if one.cache is None else one.cache.physical_length(index)
        rule = near_rule(rows.visual & rows.held, rows.near, past)
    if weights is not None and kind not in ("sdpa", "eager"):
        raise UnsupportedCall(
            f"soft masks need attention that takes an additive mask, not {kind!r}; load the model with "
            "attn_implementation='sdpa'"
        )
    causal = create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=model_mask(config, mask, hidden),
        past_key_values=one.cache,
        position_ids=None,
        and_mask_function=rule,
        layer_idx=index,
    )
    return causal if weights is None else soft_mask(weights, causal, hidden.dtype)
