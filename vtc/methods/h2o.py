"""H2O on visual entries: heavy hitters of the whole prompt's attention and the most recent (arXiv:2306.14048)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import StageView
from vtc.method.entries import EntryCompressor, latest
from vtc.method.llm_readings import PromptSum
from vtc.method.readings import AttentionCall, QueryRows
from vtc.method.registry import register

Scores = Literal["sum", "mean", "text_rows"]


@dataclass(frozen=True)
class PromptMean(PromptSum):
    """As `PromptSum`, divided by the rows of the prompt that can see the key."""

    name: ClassVar[str] = "prompt rows, mean"

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        found, seen = super().read(attention, rows), rows.prompt.flip(1).cumsum(1).flip(1)
        earlier = found.shape[-1] - seen.shape[1]  # keys of earlier turns, which every row sees
        return found / torch.cat([seen[:, :1].expand(-1, earlier), seen], 1).clamp(min=1)


@dataclass(frozen=True)
class TextSum(PromptSum):
    """As `PromptSum`, over the text behind each row's first visual token; over the whole prompt where there is none."""

    name: ClassVar[str] = "text behind the image"

    def asking(self, rows: QueryRows) -> Tensor:
        return torch.where(rows.asking.any(1, keepdim=True), rows.asking, rows.prompt)


READINGS: dict[Scores, type[PromptSum]] = {"sum": PromptSum, "mean": PromptMean, "text_rows": TextSum}


@register
class H2O(EntryCompressor):
    """Keep, in every layer, the visual entries that drew the most attention so far, and the most recent ones.

    Acts after the prefill; training-free. An entry's score in a KV head of a layer is the softmax attention that it
    receives from all rows of the prompt, summed over the rows, mean over the query heads that share it. Of K entries
    that an item may keep in a head, the last ``floor(recent K)`` stay and the best scores of the others. The prefill is
    untouched and saves nothing; decoding runs on the shorter cache.

    scores: "sum" as in the paper, which favours early entries, since more rows can see them; "mean" divides each sum
    by the number of these rows; "text_rows" sums over the text behind a prompt's first image alone, and so follows the
    question; where none stands there, over the whole prompt.
    recent: share of the budget for the last entries, 0.5 as in the paper (as many recent as heavy); 0 ranks all.
    per_head: False keeps the same entries in all KV heads of a layer, by the mean of their scores.

    Departures from the paper and its code: only visual entries leave and only they count in the budget, which each
    image or video has for itself, recent ones included; entries leave once, after the prefill, and not at every
    decoding step, so that the attention of what is generated plays no part; newline tokens stay; "mean" and "text_rows"
    are ours.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("h2o", recent=0.1).plan(llava).needs.llm[0]
    PromptSum(per_head=True)
    """

    recent: float = 0.5
    per_head: bool = True
    scores: Scores = "sum"

    name: ClassVar[str] = "h2o"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recent <= 1:
            raise VTCError(f"recent={self.recent!r} is no share of the budget; pass 0 to 1, the paper uses 0.5")

    @property
    def reading(self) -> PromptSum:
        return READINGS[self.scores](self.per_head)

    def score(self, view: StageView, layer: int) -> Tensor:
        return view.llm_attention(layer, self.reading)

    def first(self, view: StageView, counts: Sequence[int]) -> Tensor:
        """The most recent entries of each item."""
        return latest(view.items, [math.floor(self.recent * count) for count in counts])
