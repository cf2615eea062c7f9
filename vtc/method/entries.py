"""Methods that rank the visual entries of each LLM layer's KV cache and keep the best of them after the prefill."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.method.base import CacheStage, Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.items import ItemTable
from vtc.method.readings import LLMReading
from vtc.ops.host import put
from vtc.ops.select import top_k


@dataclass(frozen=True)
class EntryCompressor(Compressor):
    """A method that keeps, in every layer's cache, the highest-scoring visual entries of each item.

    The prefill is untouched: every token enters every layer, and the first answer token is the untouched model's. KV
    heads of a layer keep entries of their own where `score` tells their scores apart, and the same ones otherwise.

    >>> from dataclasses import dataclass
    >>> from vtc.method.rows import Rows
    >>> @dataclass(frozen=True)
    ... class KeepLooked(EntryCompressor):
    ...     @property
    ...     def reading(self):
    ...         return Rows.LAST
    ...     def score(self, view, layer):
    ...         return view.llm_attention(layer, self.reading)
    >>> import vtc
    >>> len(KeepLooked().plan(vtc.adapters.families()["llava"].references[0]).stages)
    32
    """

    @property
    @abstractmethod
    def reading(self) -> LLMReading:
        """What is read of every layer."""

    def plan(self, model: ModelSpec) -> Plan:
        layers = range(model.llm_layers)
        return Plan(tuple(map(CacheStage, layers)), Needs(llm=dict.fromkeys(layers, self.reading)), "preserve")

    @abstractmethod
    def score(self, view: StageView, layer: int) -> Tensor:
        """[I, N] scores of the entries of `layer`, or [H, I, N] of each of its KV heads; higher is kept."""

    def counts(self, view: StageView, layer: int) -> Sequence[int]:
        """Entries of each item that stay in `layer`: by default, the same in all."""
        return view.keep

    def first(self, view: StageView, counts: Sequence[int]) -> Tensor | None:
        """[I, N] bool, entries that stay in front of all scores, not more than `counts` of an item; None for none."""
        return None

    def select(self, view: StageView) -> Selection:
        """Keep what `first` marks and the best of the others."""
        assert isinstance(view.stage, CacheStage)
        layer, items = view.stage.from_layer, view.items
        counts, scores = self.counts(view, layer), self.score(view, layer)
        first, ranked = self.first(view, counts), scores
        if first is not None:  # the maximum of floats is found several times as fast as a mask is filled in
            ranked = torch.maximum(scores, torch.where(first, torch.inf, -torch.inf))
        heads, keep = scores.shape[:-2].numel(), put(counts, view.device)
        mask = None if items.gaps is None else items.mask.repeat(heads, 1)
        kept = top_k(ranked.flatten(0, -2), keep.repeat(heads), mask, most=max(counts, default=0)).view_as(scores)
        if scores.ndim == 2:
            return Selection(kept, counts=counts, scores=scores)
        return Selection(kept.transpose(0, 1), counts=counts)


def latest(items: ItemTable, counts: Sequence[int]) -> Tensor:
    """Mark the last `counts` entries of each item; bool [I, N]."""
    begins = [have - last for have, last in zip(items.counts, counts, strict=True)]
    begin = put(begins, items.mask.device)[:, None]
    return items.mask & (torch.arange(items.mask.shape[1], device=begin.device) >= begin)
