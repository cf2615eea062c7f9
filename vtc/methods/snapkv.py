"""SnapKV on visual entries: what the last rows of the prompt attend to stays in the cache (arXiv:2404.14469)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool1d

from vtc.errors import VTCError
from vtc.method.base import StageView
from vtc.method.entries import EntryCompressor, latest
from vtc.method.llm_readings import LastRows
from vtc.method.registry import register


@register
class SnapKV(EntryCompressor):
    """Keep, in every layer, the visual entries that the prompt's last rows attend to, and their neighbours.

    Acts after the prefill; training-free, follows the question. An entry's score in a KV head of a layer is the softmax
    attention of the last `window` rows of the prompt, mean over rows and over the query heads that share it, averaged
    over the `kernel` entries around it in the sequence, text included and with zeros beyond its ends. Entries inside
    the window stay first, the latest of them where not all fit; then the best scores. The prefill is untouched and
    saves nothing; decoding runs on the shorter cache.

    window: rows, 32 as in the released code. kernel: odd width of the average, 5 as there; 1 averages nothing.
    per_head: False keeps the same entries in all KV heads of a layer, by the mean of their scores.

    Departures from the paper and its code: only visual entries leave and only they count in the budget, which each
    image or video has for itself; newline tokens stay; each row of a batch is read at its own last tokens, an answer is
    not part of the prompt.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("snapkv").plan(llava).needs.llm[31]
    LastRows(window=32, per_head=True)
    """

    window: int = 32
    kernel: int = 5
    per_head: bool = True

    name: ClassVar[str] = "snapkv"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise VTCError(f"window={self.window!r} holds no row to rank by; pass 1 or more, the code uses 32")
        if self.kernel < 1 or not self.kernel % 2:
            raise VTCError(f"kernel={self.kernel!r} has no middle; pass an odd width, the code uses 5")

    @property
    def reading(self) -> LastRows:
        return LastRows(self.window, self.per_head)

    def score(self, view: StageView, layer: int) -> Tensor:
        rows = view.llm_rows[layer, self.reading]
        seen = rows.masked_fill(last_rows(view.prompt, self.window), 0)
        pooled = avg_pool1d(seen, self.kernel, stride=1, padding=self.kernel // 2)
        return view.items.take(pooled)

    def first(self, view: StageView, counts: Sequence[int]) -> Tensor:
        """Entries inside the window, the latest of each item that fit."""
        items = view.items
        inside = items.take(last_rows(view.prompt, self.window)) & items.mask
        return inside & latest(items, counts)


def last_rows(prompt: Tensor, window: int) -> Tensor:
    """Mark the last `window` rows of each prompt; [B, L] bool.

    >>> import torch
    >>> last_rows(torch.tensor([[False, True, True, True, False]]), 2).int().tolist()
    [[0, 0, 1, 1, 0]]
    """
    behind = prompt.sum(1, keepdim=True) - prompt.cumsum(1)
    return prompt & (behind < window)
