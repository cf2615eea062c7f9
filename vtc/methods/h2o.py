"""H2O on visual entries: heavy hitters of the whole prompt's attention and the most recent (arXiv:2306.14048)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import StageView
from vtc.method.entries import EntryCompressor, latest
from vtc.method.llm_readings import PromptSum
from vtc.method.registry import register


@register
class H2O(EntryCompressor):
    """Keep, in every layer, the visual entries that drew the most attention so far, and the most recent ones.

    Acts after the prefill; training-free. An entry's score in a KV head of a layer is the softmax attention that it
    receives from all rows of the prompt, summed over the rows, mean over the query heads that share it. Of K entries
    that an item may keep in a head, the last ``floor(recent K)`` stay and the best scores of the others. The prefill is
    untouched and saves nothing; decoding runs on the shorter cache. The sums favour early entries, which more rows can
    see.

    recent: share of the budget for the last entries, 0.5 as in the paper (as many recent as heavy); 0 ranks all.
    per_head: False keeps the same entries in all KV heads of a layer, by the mean of their scores.

    Departures from the paper and its code: only visual entries leave and only they count in the budget, which each
    image or video has for itself, recent ones included; entries leave once, after the prefill, and not at every
    decoding step, so that the attention of what is generated plays no part; newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("h2o", recent=0.1).plan(llava).needs.llm[0]
    PromptSum(per_head=True)
    """

    recent: float = 0.5
    per_head: bool = True

    name: ClassVar[str] = "h2o"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise VTCError(f"recent={self.recent!r} is no share of the budget; pass 0 to 1, the paper uses 0.5")

    @property
    def reading(self) -> PromptSum:
        return PromptSum(self.per_head)

    def score(self, view: StageView, layer: int) -> Tensor:
        return view.llm_attention(layer, self.reading)

    def first(self, view: StageView, counts: Sequence[int]) -> Tensor:
        """The most recent entries of each item."""
        return latest(view.items, [math.floor(self.recent * count) for count in counts])
