"""VL-Cache: how many visual entries a layer's cache keeps follows its sparsity (arXiv:2410.23317)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import StageView
from vtc.method.budget import CACHED, NOISE, spend
from vtc.method.entries import EntryCompressor
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.method.registry import register
from vtc.ops.attention import CHUNK, attention_logits
from vtc.ops.select import front_pack, rounded

SCARCE = 1e-4
"""A layer is taken to be at least so dense."""


@dataclass(frozen=True)
class PostVision(LLMReading):
    """Of the prompt's rows behind the last visual token, or its last row where none is: [1 + H, B, L].

    First, the same number at every key: the share of the entries that these rows and all heads can see, which is at
    least `threshold` times its row's largest; one minus the sparsity. Then for each of H KV heads the softmax attention
    to each key, mean over the query heads that share it, summed over these rows.
    """

    threshold: float = 0.01

    name: ClassVar[str] = "rows behind the image"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * text * length * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        prompt, groups, heads = rows.prompt, attention.key.shape[1], attention.query.shape[1]
        place = torch.arange(prompt.shape[1], device=prompt.device)
        begin = (place * rows.visual).amax(1, keepdim=True)
        asking = prompt & ((place > begin) & rows.visual.any(1, keepdim=True) | (place == rows.last))
        index = front_pack(asking, max(1, rows.text_count))
        real = torch.arange(index.shape[1], device=index.device) < asking.sum(1, keepdim=True)
        seen = prompt.cumsum(1).gather(1, index) * real
        total = prompt.new_zeros(len(prompt), groups, prompt.shape[1], dtype=torch.float32)
        large = seen.new_zeros(len(prompt))
        for start in range(0, index.shape[1], CHUNK):
            part, counts = index[:, start : start + CHUNK], real[:, start : start + CHUNK]
            weights = attention_logits(
                attention.query, attention.key, part, attention.scaling, mask=rows.mask, causal=True
            ).softmax(-1)
            enough = weights >= self.threshold * weights.amax(-1, keepdim=True)
            large += (enough[..., -prompt.shape[1] :] & counts[:, None, :, None]).sum((1, 2, 3))
            drawn = torch.einsum("bhrk,br->bhk", weights, counts.float())[..., -prompt.shape[1] :]
            total += drawn.view(len(prompt), groups, -1, prompt.shape[1]).mean(2)
        density = large / (heads * seen.sum(1)).clamp(min=1)
        return torch.cat([density[:, None, None].expand_as(total[:, :1]), total], 1).transpose(0, 1)


@register
class VLCache(EntryCompressor):
    """Keep, in every layer, the visual entries that the question attends to, more of them in layers that look widely.

    Acts after the prefill; training-free, follows the question. Both parts look at the rows of the prompt behind its
    last visual token. A layer's density d_l is the share of the entries that they can see, over all heads, which are at
    least `threshold` times the largest of their row. With a mean of K entries of an item over L layers, layer l keeps
    ``min(n, max(floor n, x d_l))`` of its n, with the one x for which the mean is K. An entry's score in a KV head of a
    layer is the attention that these rows pay to it, summed over the rows, mean over the query heads that share it. The
    prefill is untouched and saves nothing; decoding runs on the shorter cache.

    threshold: 0.01 as in the paper. floor: least share of the entries that a layer keeps, 0.01 as in the code, as far
    as K allows. per_head: False keeps the same entries in all KV heads of a layer, by the mean of their scores.

    Departures from the paper and its code: only visual entries leave and only they count in the budget, which each
    image or video has for itself, so that the window of recent tokens, text as a rule, costs nothing; what the bounds
    cut off a layer's share goes to the other layers, so that the mean is K exactly; newline tokens stay. Without text
    behind the image the last row of the prompt is looked at.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("vlcache", threshold=0.05).plan(llava).needs.llm[0]
    PostVision(threshold=0.05)
    """

    threshold: float = 0.01
    floor: float = 0.01
    per_head: bool = True

    name: ClassVar[str] = "vlcache"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise VTCError(
                f"threshold={self.threshold!r} is no share of a row's largest entry; pass a number above 0 and up to "
                "1, the paper uses 0.01"
            )
        if not 0 <= self.floor <= 1:
            raise VTCError(f"floor={self.floor!r} is no share of a layer's entries; pass 0 to 1, the code uses 0.01")

    @property
    def reading(self) -> PostVision:
        return PostVision(self.threshold)

    def score(self, view: StageView, layer: int) -> Tensor:
        scores = view.llm_attention(layer, self.reading)[1:]
        return scores if self.per_head else scores.mean(0)

    def counts(self, view: StageView, layer: int) -> Sequence[int]:
        """Synchronises once per call, for the densities of all layers."""
        if self not in view.memory:
            layers = range(view.model.llm_layers)
            read = torch.stack([view.llm_rows[each, self.reading][0, :, 0] for each in layers], 1).tolist()
            columns = zip(view.items.rows, view.keep, view.items.counts, strict=True)
            view.memory[self] = [shares(keep, have, tuple(read[row]), self.floor) for row, keep, have in columns]
        return [counts[layer] for counts in view.memory[self]]


@functools.lru_cache(CACHED)
def shares(keep: int, have: int, density: tuple[float, ...], floor: float) -> tuple[int, ...]:
    """Entries that each layer keeps of `have`, `keep` in the mean, in proportion to `density` within the bounds.

    >>> shares(20, 50, (0.1, 0.2, 0.3), 0.01), shares(30, 50, (0.1, 0.1, 0.9), 0.01)
    ((10, 20, 30), (20, 20, 50))
    """
    layers, least = len(density), min(floor * have, keep)
    weights = [max(each, SCARCE) for each in density]

    def curve(x: float) -> list[float]:
        return [min(float(have), max(least, x * weight)) for weight in weights]

    exact = spend(keep * layers, [1] * layers, curve, between=(0.0, have / min(weights)), slack=layers)
    found = [math.floor(each + NOISE) for each in exact]
    left = [round(each - low, 6) for each, low in zip(exact, found, strict=True)]
    return tuple(rounded(found, left, keep * layers))
