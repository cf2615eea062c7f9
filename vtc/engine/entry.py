"""What enters the language model: from the arguments of a call to a batch with its prompt and its items."""

from __future__ import annotations

from typing import Any

import torch

from vtc.adapters.base import Adapter
from vtc.batch.items import find_items, host_counts
from vtc.batch.prompt import Bounds, Prompt
from vtc.batch.rows import Batch, RowTable
from vtc.engine.cache import CompressedCache
from vtc.engine.generating import GenerateWatch, control_tokens
from vtc.engine.inputs import logical_positions, mask_2d, placeholder_masks
from vtc.engine.llm_pass import LLMPass


class Entry:
    """Reads the calls of one model. bounds: what the caller says about the prompt; may be set anew between calls."""

    def __init__(self, adapter: Adapter, bounds: Bounds) -> None:
        self.adapter, self.bounds = adapter, bounds
        self.watch, self._controls = GenerateWatch(adapter.model), control_tokens(adapter.model)

    def find(self, one: LLMPass, given: dict[str, Any]) -> None:
        """Mark the placeholders and control tokens of a call that brings media, from the backbone's arguments."""
        table = self.adapter.model.get_input_embeddings()
        one.ids = given.get("input_ids")
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
        one.contexts = self.adapter.regroup(one.given or tuple(one.contexts), one.placeholders, one.ids)
        return find_items(batch, one.placeholders, one.contexts, list(self.adapter.placeholders), counts, prompt)
