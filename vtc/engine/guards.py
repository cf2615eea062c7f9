"""Calls that would run without compression although a method is attached: refused or, where right, warned of."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from vtc.engine.installed import MethodWrapper
from vtc.errors import UnsupportedCall, UnsupportedModel

BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Entry points of continuous batching: it packs prompts into one row and keeps a paged cache of its own."""


class CompressionWarning(UserWarning):
    """Something runs without compression although a method is attached."""


def check_without_media(given: Mapping[str, Any], tokens: Iterable[int], warned: bool) -> bool:
    """Look at a call without pixels; returns True where the user has been warned, now or before.

    Only the start of a sequence is looked at: later placeholder ids may have been generated, which makes them text.
    Raises UnsupportedCall for placeholder ids without pixels, whose rows the caller must have filled in elsewhere.
    A prompt of embeddings is warned of, not refused, because one of text alone is legitimate and looks the same.
    """
    cache, ids, embeds = given.get("past_key_values"), given.get("input_ids"), given.get("inputs_embeds")
    rows: Tensor | None = embeds if ids is None else ids
    if rows is None or rows.shape[1] < 2 or (cache is not None and cache.get_seq_length()):
        return warned
    if ids is not None:
        if bool(torch.stack([ids == token for token in tokens]).any()):
            raise UnsupportedCall(
                "the prompt holds image or video placeholders but no pixels, so nothing could be compressed; pass its "
                "pixels in the same call"
            )
        return warned
    if not warned:
        warnings.warn(
            "vtc: a prompt came as inputs_embeds without pixels and runs without compression; if images are merged "
            "into it, pass input_ids with their pixels instead",
            CompressionWarning,
            stacklevel=2,
        )
    return True


def refuse_skipped(where: str) -> NoReturn:
    """Raise UnsupportedModel for a call in which a hook of the engine did not run."""
    raise UnsupportedModel(
        f"pixels went in but the hooks of the compression did not run on {where}, so the result would not be what was "
        "asked for; code compiled around them leaves them out: compile the forward method of every LLM layer instead, "
        "layer.forward = torch.compile(layer.forward, dynamic=True)"
    )


def _refuse(name: str, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedCall(
        f"{name}() packs prompts into one row of a paged cache, which compression cannot follow; call generate(), or "
        "leave the `with` block first"
    )


class BatchingBlock:
    """Refuses continuous batching on one model while installed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._wrappers: list[MethodWrapper] = []

    def install(self) -> None:
        """Cover the entry points that the model has."""
        for name in BATCHING:
            if hasattr(self._model, name):
                self._wrappers.append(MethodWrapper(self._model, name, functools.partial(_refuse, name)))

    def remove(self) -> None:
        """Uncover them again."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers = []
