"""Small methods that exercise the engine's stages in tests; they are not registered."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from vtc.method.base import (
    AFTER_PREFILL,
    CacheStage,
    Compressor,
    ModelSpec,
    Needs,
    Plan,
    Positions,
    Rows,
    Selection,
    Stage,
    StageView,
)
from vtc.ops.hashing import uniform
from vtc.ops.select import top_k


@dataclass(frozen=True)
class FixedKeep(Compressor):
    """Drop a random share of each item's tokens at every given stage, seeded by item, stage and token.

    static: give the counts to the engine; otherwise each token is drawn on its own and the counts stay data-dependent.
    skips: the stages that drop tokens for one layer alone. gains: give the tokens numbers between 0.5 and 1.5 there.
    """

    at: tuple[Stage, ...] = (0,)
    rate: float = 0.5
    seed: int = 0
    static: bool = True
    skips: tuple[int, ...] = ()
    gains: bool = False

    name: ClassVar[str] = "fixed_keep"

    @property
    def needs_budget(self) -> bool:
        return False

    default_positions: ClassVar[Positions] = "preserve"

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, Needs(), self.default_positions, skips=self.skips, gains=self.gains)

    def select(self, view: StageView) -> Selection:
        salt = self.at.index(view.stage) + 17 * self.seed
        draw = uniform(view.fingerprint, view.items.token, salt)
        gains = None
        if self.gains and view.stage in self.skips:
            gains = 0.5 + uniform(view.fingerprint, view.items.token, salt + 1000)
        if not self.static:
            return Selection(draw < self.rate, gains=gains)
        counts = [round(count * self.rate) for count in view.items.counts]
        keep = torch.tensor(counts, device=draw.device)
        return Selection(top_k(draw, keep, view.items.mask), counts=counts, gains=gains)


@dataclass(frozen=True)
class FixedHeads(FixedKeep):
    """As `FixedKeep`; after the prefill every KV head of a layer, `heads` of them, keeps a draw of its own."""

    at: tuple[Stage, ...] = (1, CacheStage(2))
    heads: int = 2

    name: ClassVar[str] = "fixed_heads"

    def select(self, view: StageView) -> Selection:
        if not isinstance(view.stage, CacheStage):
            return super().select(view)
        seeds = range(self.seed, self.seed + self.heads)
        drawn = [FixedKeep(self.at, self.rate, seed, self.static).select(view) for seed in seeds]
        return dataclasses.replace(drawn[0], keep=torch.stack([each.keep for each in drawn], 1))


@dataclass(frozen=True)
class LastRowTopK(Compressor):
    """Prune before LLM layer `layer` by the attention of the last token in the layer before it."""

    layer: int = 2

    name: ClassVar[str] = "last_row_top_k"

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.layer,), Needs(llm={self.layer - 1: Rows.LAST}), "preserve")

    def select(self, view: StageView) -> Selection:
        counts = view.keep_from_layer(self.layer)
        keep = torch.tensor(counts, device=view.device)
        return Selection(top_k(view.llm_attention(self.layer - 1), keep, view.items.mask), counts=counts)


EVICT_HALF = FixedKeep(at=(0, AFTER_PREFILL))
"""Half the tokens go before the LLM, half of the rest leave the cache after the prefill."""
