"""Reading the arguments of a forward call: visual tokens, masks, positions and the cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtc.adapters.compat import checkpoints
from vtc.batch.context import VisionContext
from vtc.engine.cache import CompressedCache, check_plain
from vtc.engine.maker import Maker
from vtc.errors import UnsupportedCall

MEDIA = ("pixel_values", "pixel_values_videos")


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward call by name, whether they were passed by position or by keyword."""
    if not args:
        return kwargs
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


def carries_media(given: dict[str, Any]) -> bool:
    """True when the call brings pixels or encoder outputs.

    Only such a call holds visual tokens: a placeholder id that the model generated is text.
    """
    return bool(given.get("mm_encoder_outputs")) or any(given.get(name) is not None for name in MEDIA)


def given_contexts(given: dict[str, Any], recall: Callable[[Any], VisionContext | None]) -> tuple[VisionContext, ...]:
    """Descriptions of encoder outputs passed along (generate() encodes before forward() since transformers 5.20).

    recall: finds the description of an output.
    """
    outputs = [output for output in (given.get("mm_encoder_outputs") or {}).values() if output is not None]
    contexts = tuple(context for context in map(recall, outputs) if context is not None)
    if len(contexts) != len(outputs):
        raise UnsupportedCall(
            "mm_encoder_outputs were encoded without the attached method (or cut by chunked prefill); encode them "
            "inside the `with` block and pass them whole"
        )
    return contexts


def placeholder_masks(given: dict[str, Any], tokens: Iterable[int], embedding: Any) -> Tensor:
    """[K, B, S] bool, one mask per placeholder id; read from ids, or from embeddings where only those are given."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if ids is not None:
        return torch.stack([ids == token for token in tokens])
    assert embeds is not None
    rows = [embedding(torch.tensor(token, device=embeds.device)) for token in tokens]
    return torch.stack([(embeds == row).all(-1) for row in rows])


def mask_2d(kwargs: dict[str, Any]) -> Tensor | None:
    """The [batch, rows] attention mask of a language-model call; UnsupportedCall for any other form."""
    mask = kwargs.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    raise UnsupportedCall(
        "compression needs a 2D attention mask [batch, length]; custom 4D masks and static caches are not supported"
    )


def check_router(kwargs: dict[str, Any]) -> None:
    """Refuse the statistics of experts: the model weighs them by the mask of the whole prompt, once tokens are gone.

    Without a mask the padding that packing adds would count as well.
    """
    if kwargs.get("output_router_logits"):
        raise UnsupportedCall(
            "output_router_logits=True asks for the load-balancing loss of a mixture of experts, which the model "
            "weighs by the attention mask of the whole prompt, while visual tokens are removed; pass "
            "output_router_logits=False, or set it so in model.config.text_config"
        )


def adopt_cache(
    kwargs: dict[str, Any], language_model: Any, starts: Sequence[int], maker: Maker
) -> CompressedCache | None:
    """The call's cache, adopted for compression; None when the call uses none.

    Under gradient checkpointing no layer writes one: a fresh one is left out, one that holds tokens is refused.
    """
    cache, mask, wanted = kwargs.get("past_key_values"), mask_2d(kwargs), kwargs.get("use_cache")
    if checkpoints(language_model):
        if cache is not None and cache.get_seq_length():
            raise UnsupportedCall(
                "gradient checkpointing ignores the KV cache that was passed, so its tokens would be missing; pass no "
                "past_key_values, or switch checkpointing off"
            )
        kwargs["use_cache"] = False
        return None
    if cache is None:
        if not (language_model.config.use_cache if wanted is None else wanted):
            return None
        cache = DynamicCache(config=language_model.config)
    past = None
    if not isinstance(cache, CompressedCache):
        check_plain(cache)
        seen = cache.get_seq_length()
        past = mask[:, :seen].bool() if mask is not None and seen else None
    return CompressedCache.adopt(cache, starts, past, maker)


def logical_positions(
    ids: Tensor | None, batch: int, length: int, seen: int, device: torch.device, *, mrope: bool
) -> Tensor:
    """Position ids the untouched model would use: [B, S], or [3, B, S] for multi-axis positions."""
    if ids is None:
        ids = (torch.arange(length, device=device) + seen)[None]
    if ids.ndim == 3 and ids.shape[0] == 4:
        ids = ids[1:]  # the text row only feeds packed-sequence detection
    if mrope and ids.ndim == 2:
        ids = ids[None].expand(3, -1, -1)
    return ids.expand(*ids.shape[:-2], batch, length)
