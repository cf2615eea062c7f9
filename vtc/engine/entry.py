"""What enters the language model: from the arguments of a call to a batch with its prompt and its items.

Where the prompt ends is known from what generate() was given, where the question begins from tokens that part turns.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.batch.items import find_items, host_counts
from vtc.batch.prompt import Bounds, Prompt
from vtc.batch.rows import Batch, RowTable
from vtc.engine.cache import CompressedCache
from vtc.engine.inputs import logical_positions, mask_2d, placeholder_masks
from vtc.engine.installed import MethodWrapper
from vtc.engine.llm_pass import LLMPass


class Entry:
    """Reads the calls of one model. bounds: what the caller says about the calls; may be set anew between calls."""

    def __init__(self, adapter: Adapter, bounds: Bounds) -> None:
        self.adapter, self.bounds = adapter, bounds
        self.watch, self._controls = GenerateWatch(adapter.model), control_tokens(adapter.model)

    def find(self, one: LLMPass, given: dict[str, Any]) -> None:
        """Mark the placeholders and control tokens of a call that brings media, from the backbone's arguments."""
        table = self.adapter.model.get_input_embeddings()
        one.ids, one.questions = given.get("input_ids"), self.bounds.questions
        one.placeholders = placeholder_masks(given, self.adapter.placeholders.values(), table)
        one.control = placeholder_masks(given, self._controls, table).any(0) if self._controls else None

    def batch(self, one: LLMPass, kwargs: dict[str, Any]) -> Batch:
        """The rows of this call and what there is to look at; one host synchronisation where media are carried."""
        (size, length, _), before = kwargs["inputs_embeds"].shape, kwargs.get("past_key_values")
        device, seen = kwargs["inputs_embeds"].device, 0 if before is None else before.get_seq_length()
        source = torch.arange(length, device=device).expand(size, -1)
        if one.placeholders is None and not isinstance(before, CompressedCache):
            return Batch(RowTable(source), length)
        mask, ids = mask_2d(kwargs), kwargs.get("position_ids")
        logical = logical_positions(ids, size, length, seen, device, mrope=self.adapter.spec.mrope)
        valid = mask[:, -length:].bool() if mask is not None and length > 1 else None
        batch = Batch(RowTable(source, logical, valid=valid), length)
        if one.placeholders is None:
            return batch
        visual = one.placeholders.any(0)
        prompt = Prompt.find(visual, one.control, mask, one.labels, self.watch.limit(seen), self.bounds)
        counts = host_counts(one.placeholders, prompt)
        if not any(counts.kinds):
            return batch
        one.contexts = self.adapter.regroup(
            one.given or one.contexts, one.placeholders, one.ids, self.bounds.image_sizes
        )
        return find_items(batch, one.placeholders, one.contexts, list(self.adapter.placeholders), counts, prompt)


def control_tokens(model: Any) -> tuple[int, ...]:
    """Ids that begin a sequence or end a turn, from the configurations of a model."""
    config = model.config.get_text_config()
    found: dict[int, None] = {}
    for source in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            ids = getattr(source, name, None)
            for token in [ids] if isinstance(ids, int) else ids or ():
                found[token] = None
    return tuple(found)


class GenerateWatch:
    """Notes, per thread, what generate() of one model was given, so that drafts and answers are told from the prompt.

    Inside a nested call (a model that drafts for itself) the outer call's prompt counts.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state = threading.local()
        self._wrapper: MethodWrapper | None = None

    def install(self) -> None:
        """Wrap generate() on the instance; models without one are left alone."""
        function = getattr(self._model, "generate", None)
        if function is not None:
            self._wrapper = MethodWrapper(self._model, "generate", self._noting(function))

    def remove(self) -> None:
        """Restore the instance."""
        if self._wrapper is not None:
            self._wrapper.remove()

    def limit(self, seen: int) -> int | None:
        """Columns of the coming chunk that are prompt, behind `seen` cached tokens; None outside generate()."""
        noted: tuple[int, bool] | None = getattr(self._state, "noted", None)
        if noted is None:
            return None
        length, whole = noted
        return max(0, length - seen) if whole else length

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        state = self._state

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(state, "noted", None)
            state.noted = outer if outer is not None else _given(*args[:1], **kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                state.noted = outer

        return generate


def _given(
    inputs: Any = None, *, input_ids: Any = None, inputs_embeds: Any = None, **_: Any
) -> tuple[int, bool] | None:
    """Columns that generate() was given, and whether they begin with what its cache has seen already."""
    for value, whole in ((inputs_embeds, False), (inputs, True), (input_ids, True)):
        if isinstance(value, Tensor):
            return value.shape[1], whole
    return None
