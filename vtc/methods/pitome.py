"""PiToMe: merge where many tokens are alike, leave the isolated ones alone (arXiv:2405.16148)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vtc.errors import VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Plan, Scope, Selection, StageView
from vtc.method.parts import even, merge_items, merged_inside, merging_plan
from vtc.method.registry import register
from vtc.method.vision_readings import MeanKeys
from vtc.ops.host import put
from vtc.ops.merge import BLOCK, bipartite_merge, merge_plan, merge_rows
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import first_best, front_pack, settle, take_rows

KEYS = MeanKeys()
ALIKE = 1e-5
"""Cosines closer than this count as equal."""


@register
class PiToMe(Compressor):
    """Merge among the tokens of highest energy, those in large groups of similar ones; isolated tokens are protected.

    Training-free, text-agnostic. The energy of a token is the mean over all tokens j, itself included, of
    ELU(cos(z_i, z_j) - m) with the margin m = 0.9 (1 - l / L) in block l of L. Of T tokens, r are to go: the 2 r of
    highest energy may merge, all others are protected. Of those, in the order of their energy, the even ones each join
    the most similar odd one; means are weighted by what tokens stand for. By default it acts before the LLM: the
    projected tokens of each crop or frame merge by halves until the budget is met, with the keys and the margin of the
    feature layer (the last one up to it that sees the whole image).

    inside: merge in the vision encoder instead, as published, after every block up to the feature layer; for encoders
    that allow it. A block keeps the share q of its tokens, the same in all n blocks, so that a retention is q ** n; the
    budget counts per crop. ratio: the share q instead of a budget; the paper uses 0.9 to 0.98. metric: what z is, the
    "keys" (mean over heads) or the "features" themselves. weighted: means weighted by sizes, or plain ones of what
    merges. proportional: inside, later blocks attend to a merged token as often as it has patches,
    softmax(Q K^T / sqrt(d) + log size). scope: before the LLM, merge in each "crop" or frame or over the whole "item".

    Departures from the paper and its code: the default acts behind the encoder, which works on every model; inside,
    tokens merge after a block and not between its attention and its MLP; they stay in the order of the picture instead
    of protected ones first; a budget is met to the token, by more passes behind the last block where q is below one
    half. Class and register tokens stay out of it. The released code for CLIP has metric="features",
    weighted=False, proportional=False and begins with ToMe's matching in its first 13 blocks, which is left out here.

    >>> import vtc
    >>> vtc.create("pitome", inside=True, ratio=0.9).needs_budget
    False
    """

    inside: bool = False
    ratio: float | None = None
    metric: Literal["keys", "features"] = "keys"
    weighted: bool = True
    proportional: bool = True
    scope: Scope = "crop"

    name: ClassVar[str] = "pitome"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is not None and not self.inside:
            raise VTCError(f"ratio={self.ratio} is a share per encoder block; pass inside=True, or leave ratio out")
        if self.ratio is not None and not 0.5 <= self.ratio <= 1:
            raise VTCError(
                f"ratio={self.ratio} lies outside [0.5, 1]; it is the share of tokens that each block keeps, of which "
                "at most half can merge at once; write for example ratio=0.95"
            )

    @property
    def needs_budget(self) -> bool:
        """False where a ratio says how much to merge."""
        return self.ratio is None

    def plan(self, model: ModelSpec) -> Plan:
        reading = KEYS if self.metric == "keys" else None
        return merging_plan(model, reading, inside=self.inside, sizes=self.proportional)

    def steps(self, blocks: int, tokens: int, keep: int | None) -> list[list[int]]:
        """Tokens to merge after each of `blocks` blocks, a list of passes each; keep: how many are to be left.

        >>> PiToMe(inside=True).steps(3, 64, 27), PiToMe(inside=True, ratio=0.9).steps(3, 64, None)
        ([[16], [12], [9]], [[6], [5], [5]])
        """
        plans: list[list[int]] = []
        start = tokens
        for block in range(blocks):
            if keep is None:
                assert self.ratio is not None
                gone = int(tokens - tokens * self.ratio)
            else:
                gone = tokens - round(start * (keep / start) ** ((block + 1) / blocks))
            plans.append([min(gone, tokens // 2)])
            tokens -= plans[-1][0]
        if keep is not None:  # more than half of the tokens cannot merge at once
            plans[-1] += merge_plan(tokens, keep)
        return plans

    def select(self, view: StageView) -> Selection | None:
        if isinstance(view.stage, EncoderStage):
            return self._inside(view, view.stage.layer - 1)
        if view.keep == view.items.counts:
            return None
        layer = view.model.key_layer
        metric = view.vision_attention(layer, KEYS) if self.metric == "keys" else view.tokens
        step = functools.partial(energy_step, margin=margin(layer, view.model))
        return merge_items(view, view.keep, metric, scope=self.scope, weighted=self.weighted, raster=True, step=step)

    def _inside(self, view: StageView, block: int) -> Selection | None:
        """After encoder block `block`."""
        items, groups, patches = view.items, len(view.items), even(view)
        if block == 0:
            keep = view.keep[0] if self.needs_budget else None
            view.memory[self, "plans"] = self.steps(view.model.feature_layer + 1, patches, keep)
            view.memory[self, "sizes"] = torch.ones_like(items.token, dtype=torch.float32)
        plan, size = view.memory[self, "plans"][block], view.memory[self, "sizes"]
        if not sum(plan):
            return None
        metric = view.vision_attention(block, KEYS) if self.metric == "keys" else view.tokens
        step = functools.partial(energy_step, margin=margin(block, view.model))
        weights = size if self.weighted else None
        merge = bipartite_merge(metric, [patches] * groups, [plan] * groups, size=weights, step=step)
        rows = merge_rows(view.tokens, merge.target, merge.weight, merge.counts[0])
        size = torch.zeros_like(merge.size).scatter_add(1, merge.target, size)
        view.memory[self, "sizes"] = size
        return merged_inside(view, rows, items.token.gather(1, merge.anchor), size if self.proportional else None)


def margin(block: int, model: ModelSpec) -> float:
    """How alike two tokens have to be to add to each other's energy; it falls with depth."""
    return 0.9 - 0.9 * block / (model.feature_layer + 1)


def energy(metric: Tensor, counts: Tensor, margin: float) -> Tensor:
    """How many tokens are like each one: [G, t, C] -> [G, t] mean of ELU(cosine - margin) over the group's tokens.

    counts: [G] tokens of each group; what stands behind them is no token.
    """
    unit = functional.normalize(metric.float(), dim=-1)
    present = torch.arange(metric.shape[1], device=metric.device) < counts[:, None]
    sums = [
        functional.elu(part @ unit.transpose(1, 2) - margin).masked_fill(~present[:, None], 0).sum(-1)
        for part in _blocks(unit, unit.shape[1])
    ]
    return torch.cat(sums, dim=1) / counts[:, None].clamp(min=1)


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    """[G, t, C] in parts of so many rows that their products with `columns` others fit into one block."""
    return torch.split(rows, max(1, BLOCK // max(1, len(rows) * columns)), dim=1)


def energy_step(
    metric: Tensor, counts: Sequence[int], merged: Sequence[int], *, margin: float
) -> tuple[Tensor, Tensor]:
    """One step for `bipartite_merge`: of the tokens of highest energy every other one joins one of the rest.

    metric: [G, t, C]; counts, merged: tokens of each group and how many disappear, at most half of them. Returns
    target [G, t] and anchor [G, K] as in `Merge`, rows in the order of their tokens. Ties go to the lower index.
    """
    groups, length, _ = metric.shape
    width, most = max(n - r for n, r in zip(counts, merged, strict=True)), max(1, *merged)
    count, gone = put(counts, metric.device), put(merged, metric.device)[:, None]
    token = torch.arange(length, device=metric.device).expand(groups, -1)
    present = token < count[:, None]
    # No energy is below -1; those of nearly equal tokens may cancel to rounding noise, 1 more of it does not.
    order = order_by(best=settle(1 + energy(metric, count, margin), present))
    rank = inverse(order)
    leaves = (rank < 2 * gone) & (rank % 2 == 0)
    slot = torch.arange(min(most, length // 2), device=metric.device)
    source, partner = order[:, : 2 * len(slot) : 2], order[:, 1 : 2 * len(slot) : 2]
    real = slot < gone
    unit = functional.normalize(metric.float(), dim=-1)
    others = take_rows(unit, partner).transpose(1, 2)
    nearest = [
        first_best((part @ others).masked_fill(~real[:, None], -torch.inf), ALIKE)
        for part in _blocks(take_rows(unit, source), others.shape[2])
    ]
    best = partner.gather(1, torch.cat(nearest, dim=1))
    joins = functional.pad(token, (0, 1)).scatter(1, torch.where(real, source, length), best)[:, :-1]
    stays = present & ~leaves
    row = (stays.long().cumsum(1) - 1).gather(1, joins)
    anchor = front_pack(stays, width)
    left = torch.arange(width, device=metric.device) < count[:, None] - gone
    return torch.where(present, row, width), torch.where(left, anchor, 0)
