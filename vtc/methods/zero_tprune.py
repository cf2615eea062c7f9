"""Zero-TPrune: PageRank on the attention graph, then similarity, between blocks of the encoder (arXiv:2305.17328)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Plan, Selection, StageView
from vtc.method.parts import inside_plan
from vtc.method.readings import AttentionCall, VisionReading
from vtc.method.registry import register
from vtc.ops.host import put
from vtc.ops.pagerank import attention_mass
from vtc.ops.select import top_k

PUBLISHED = (1, 3, 6, 9, 11)
"""Blocks of 12 in front of the pruning layers."""


@dataclass(frozen=True)
class QueriesAndKeys(VisionReading):
    """Scaled queries, and keys, of every head: [crops, T, 2, heads, head width]."""

    name: ClassVar[str] = "queries and keys"

    def read(self, attention: AttentionCall) -> Tensor:
        query, key = attention.query * attention.scaling, attention.key
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return torch.stack([query, key], dim=3).permute(0, 2, 3, 1, 4)


GRAPH = QueriesAndKeys()


@register
class ZeroTPrune(Compressor):
    """Drop what much resembles an important patch, then what little importance reaches, at layers between the blocks.

    Training-free, text-agnostic; inside the encoder alone, for encoders that allow it. The attention of the block in
    front of a pruning layer is a graph. *Importance* (weighted page rank): in every head ``s <- A^T s`` from 1 / T for
    each of T tokens, sqrt(T) / T for the class token; heads whose scores vary too little or too much are left out, the
    others joined by their root mean square. A pruning layer ranks the patches by it (I'); compares the less important
    half with the more important one by the cosine of their keys, mean over heads, and drops those most like any of them
    (S); ranks what is left by its own graph and drops the least important (I). The same number of patches leaves at
    every pruning layer. Class and register tokens are never dropped; encoders without a class token start evenly.

    layers: pruning layers, each in front of the block of that number; (1, 3, 6, 9, 11) of 12 blocks, or as far up in
    other encoders. similar: patches that S drops at each of them, at most half of what leaves there. iterations: of the
    page rank in the first, second and last third of the blocks. variance: what a head's scores may have, scaled to a
    mean of one over the tokens.

    Departures from the paper and its code: there is no released code; layers and iterations are as reported
    elsewhere, and the scale on which heads are filtered is ours, and so is that all heads count where none passes. The
    graph of what is left has rows that sum to one again. The retention is met exactly, by as many patches at each layer
    instead of per-layer rates. Patches stay in the order of the picture.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 encoder layers
    >>> [stage.layer for stage in vtc.create("zero_tprune").plan(llava).stages]
    [2, 6, 12, 17, 21]
    """

    layers: tuple[int, ...] | None = None
    similar: int = 10
    iterations: tuple[int, int, int] = (50, 10, 1)
    variance: tuple[float, float] = (0.01, 0.7)

    name: ClassVar[str] = "zero_tprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (not self.layers or list(self.layers) != sorted({*self.layers})):
            raise VTCError(f"layers={self.layers} are no rising layers; write for example (1, 3, 6, 9, 11)")
        if self.similar < 0 or min(self.iterations) < 1 or not 0 <= self.variance[0] < self.variance[1]:
            raise VTCError(
                f"similar={self.similar}, iterations={self.iterations}, variance={self.variance} prune nothing; use "
                "counts of at least 0 and 1 and a rising pair of variances, such as (0.01, 0.7)"
            )

    def stages_of(self, model: ModelSpec) -> tuple[int, ...]:
        """The pruning layers in this encoder."""
        blocks = model.feature_layer + 1
        if self.layers is None:
            places = (round(blocks * layer / 12) for layer in PUBLISHED)
            return tuple(sorted({min(max(1, place), max(1, blocks - 1)) for place in places}))
        if not 1 <= self.layers[0] <= self.layers[-1] <= blocks:
            raise UnsupportedMethod(
                f"layers={self.layers}: pruning layers of this {model.family} encoder stand behind one of its "
                f"{blocks} blocks; choose among 1 to {blocks}"
            )
        return self.layers

    def plan(self, model: ModelSpec) -> Plan:
        return inside_plan("'zero_tprune'", model, GRAPH, self.stages_of(model), attention=True)

    def leaving(self, tokens: int, keep: int, layers: int) -> list[tuple[int, int]]:
        """How many of `tokens` leave by similarity and by importance at each of so many layers.

        >>> ZeroTPrune().leaving(100, 10, 3), ZeroTPrune().leaving(16, 9, 2)
        ([(10, 20), (10, 20), (10, 20)], [(1, 2), (2, 2)])
        """
        gone = max(0, tokens - keep)
        each = [gone * (layer + 1) // layers - gone * layer // layers for layer in range(layers)]
        return [(min(self.similar, one // 2), one - min(self.similar, one // 2)) for one in each]

    def select(self, view: StageView) -> Selection:
        assert isinstance(view.stage, EncoderStage)
        items, layer, stages = view.items, view.stage.layer, self.stages_of(view.model)
        if layer == stages[0]:
            pairs = zip(items.counts, view.keep, strict=True)
            view.memory[self] = [self.leaving(now, keep, len(stages)) for now, keep in pairs]
        alike, little = zip(*(plan[stages.index(layer)] for plan in view.memory[self]), strict=True)
        graph, lead = view.vision_attention(layer - 1, GRAPH), view.vision_lead(layer - 1, GRAPH)
        counts = put([items.counts, alike, little], graph.device)
        now, alike_count, little_count = counts
        turns = self.iterations[3 * (layer - 1) // (view.model.feature_layer + 1)]

        def rank(present: Tensor, count: Tensor) -> Tensor:
            share = first_share(present, count, lead.shape[1], view.model.has_cls)
            mass = attention_mass(query, key, 1.0, share, iterations=turns, mask=mask(present))
            return importance(mass[:, :, lead.shape[1] :], present, count + lead.shape[1], self.variance)

        def mask(present: Tensor) -> Tensor:
            return functional.pad(present, (lead.shape[1], 0), value=True)

        query, key = torch.cat([lead, graph], dim=1).permute(2, 0, 3, 1, 4)
        important = top_k(rank(items.mask, now), (now + 1) // 2, items.mask)
        drop = most_similar(graph[:, :, 1].float().mean(2), items.mask & ~important, important, alike_count)
        left = items.mask & ~drop
        keep = top_k(rank(left, now - alike_count), now - alike_count - little_count, left)
        return Selection(keep, counts=[n - a - b for n, a, b in zip(items.counts, alike, little, strict=True)])


def first_share(present: Tensor, count: Tensor, lead: int, has_cls: bool) -> Tensor:
    """[I, lead + N] what tokens start with: 1 / T each of T, sqrt(T) / T the class token, which stands in front.

    present: [I, N] patches that are there, `count` [I] of them. lead: rows in front of them.
    """
    total = (count + lead)[:, None]
    share = functional.pad(present.float(), (lead, 0), value=1.0) / total
    if has_cls:
        share[:, :1] *= total.sqrt()
    return share


def importance(mass: Tensor, present: Tensor, tokens: Tensor, variance: tuple[float, float]) -> Tensor:
    """[I, N] root mean square over the heads whose scores have a variance in between; over all where none has.

    mass: [I, H, N] of every head. present: [I, N]. tokens: [I] of the graph; scores times these have a mean near one.
    """
    there = present[:, None]
    count = there.sum(2, keepdim=True).clamp(min=1)
    scores = mass * tokens[:, None, None]
    mean = torch.where(there, scores, 0).sum(2, keepdim=True) / count
    spread = torch.where(there, scores - mean, 0).square().sum(2, keepdim=True) / count
    within = (spread >= variance[0]) & (spread <= variance[1])
    within = within | ~within.any(1, keepdim=True)
    return ((mass.square() * within).sum(1) / within.sum(1)).sqrt()


def most_similar(keys: Tensor, some: Tensor, others: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` [I] of `some` with the highest cosine to any of `others`; keys [I, N, C], bool [I, N]."""
    unit = functional.normalize(keys, dim=-1)
    alike = (unit @ unit.transpose(1, 2)).masked_fill(~others[:, None], -math.inf).amax(2)
    return top_k(alike, count, some)
