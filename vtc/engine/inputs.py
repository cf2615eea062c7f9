"""What goes into a forward call and comes out of it: arguments, masks, positions, caches, outputs, and what is refused.

Hooks must stay outside compiled code: `module.forward = torch.compile(module.forward)` keeps them there, while
`module.compile()` and `torch.compile(model)` trace them too, which breaks or, inside the LLM, gives wrong logits.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtc.adapters.compat import checkpoints
from vtc.batch.context import VisionContext
from vtc.batch.rows import Batch, RowTable
from vtc.engine.cache import CompressedCache, check_plain
from vtc.engine.llm_pass import LLMPass
from vtc.engine.maker import Maker
from vtc.errors import UnsupportedCall, UnsupportedModel
from vtc.ops.host import put
from vtc.ops.select import put_rows

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
    rows = [embedding(put(token, embeds.device)) for token in tokens]
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


# --- outputs
def spread(rows: RowTable, length: int, hidden: Tensor) -> Tensor:
    """[B, L, D] rows at their input positions, [B, length, D]; zeros where a token was removed."""
    source, held = rows.source.to(hidden.device), rows.held.to(hidden.device)
    return put_rows(hidden.new_zeros(len(source), length, hidden.shape[-1]), source, held, hidden)


def asks_rows(given: dict[str, Any]) -> bool:
    """True where `logits_to_keep` numbers rows of the input, which removed tokens would shift.

    0 asks for all rows and 1 for the last, which both mean the same of a shortened sequence.
    """
    wanted = given.get("logits_to_keep")
    return isinstance(wanted, Tensor) or (wanted is not None and wanted > 1)


def align(one: LLMPass, output: Any) -> None:
    """Put every field of a language model's output that has rows back at the input positions."""
    states = getattr(output, "hidden_states", None)
    if states is not None:
        groups = [max(start for start in one.behind if start <= max(0, number - 1)) for number in range(len(states))]
        output.hidden_states = tuple(
            None if hidden is None else spread(one.behind[group], one.now.length, hidden)
            for hidden, group in zip(states, groups, strict=True)
        )
    output.last_hidden_state = spread(one.now.rows, one.now.length, output.last_hidden_state)


def check_attentions(kwargs: dict[str, Any], config: Any, aligned: bool) -> None:
    """Raise UnsupportedCall for attention matrices, whose two axes of kept rows have no place in an aligned output."""
    wanted = kwargs.get("output_attentions")
    if aligned and (config.output_attentions if wanted is None else wanted):
        raise UnsupportedCall(
            "output_attentions=True with pad_output=True: attention is computed among kept tokens only and has no rows "
            "for the others; attach without pad_output, or leave output_attentions out"
        )


def check_labels(batch: Batch, labels: Tensor | None) -> None:
    """Raise UnsupportedCall when a label's predecessor was removed, so that nothing predicts it. Synchronises."""
    if labels is None:
        return
    alive = batch.over_input().to(labels.device)
    if bool(((labels[:, 1:] != -100) & ~alive[:, :-1]).any()):
        raise UnsupportedCall(
            "a label follows a removed token, so nothing predicts it; set labels of padding and of whatever follows a "
            "visual token to -100"
        )


# --- compiled models
def _compiled_forward(module: Any) -> bool:
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def check_compiled(hooked: Sequence[Any], language_model: Any, *, inside: bool) -> None:
    """Raise UnsupportedModel for modules whose hooks are compiled; warn where compiling does not pay.

    hooked: modules the engine puts hooks on, those around the language model first. inside: the method acts at
    layers inside the LLM.
    """
    for module in hooked:
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} was compiled with .compile(), which compiles the hooks of the compression as "
                "well; compile the forward method instead: "
                "layer.forward = torch.compile(layer.forward, dynamic=True) for every LLM layer"
            )
    for module in itertools.takewhile(lambda module: module is not language_model, hooked):
        if _compiled_forward(module):
            raise UnsupportedModel(
                f"the forward method of {type(module).__name__} was compiled, and with it the hooks of the compression "
                "on the modules inside; compile the forward method of every LLM layer instead: "
                "layer.forward = torch.compile(layer.forward, dynamic=True)"
            )
    if inside and _compiled_forward(language_model):
        warnings.warn(
            "the language model's forward is compiled as a whole and the method acts inside it: exact, but the graph "
            "breaks at every stage; compile each layer's forward instead",
            stacklevel=4,
        )
