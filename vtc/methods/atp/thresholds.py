"""Threshold pruning: normalised and spatial scores, soft and hard masks, their losses, and exact token budgets.

Shapes: [I, N] values of I items with at most N tokens, `mask` [I, N] False behind an item's end. M pruning modules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.method.budget import CACHED, NOISE, spend
from vtc.ops.host import put
from vtc.ops.select import front_pack, top_k

FLOOR = 1e-6
"""The least weight a soft mask leaves a key."""


# --- scores
def min_max(scores: Tensor, mask: Tensor) -> Tensor:
    """Scale each item's scores so that the masked ones span [0, 1]; the others are clipped to it. [I, N] float32.

    >>> min_max(torch.tensor([[2.0, 6.0, 4.0, 9.0]]), torch.tensor([[True, True, True, False]])).tolist()
    [[0.0, 1.0, 0.5, 1.0]]
    """
    scores = scores.float()
    low = scores.masked_fill(~mask, math.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
    scaled = (scores - low) / (high - low + 1e-12)
    return scaled.clamp(0, 1).masked_fill(~mask.any(1, keepdim=True), 0)


def redundancy_score(own: Tensor, cross: Tensor) -> Tensor:
    """Mean of the attention a token receives from visual rows and from text rows; higher is kept. [I, N]."""
    return (own + cross) / 2


def spatial_score(row: Tensor, col: Tensor, strides: Sequence[int], lambda_sample: float) -> Tensor:
    """1 - lambda_sample / s^2, clipped to [0, 1], of the best grid of stride s that a token lies on, 0 off all grids.

    row, col: [I, N] places on the grid of the token's own crop. Returns [I, N] float32.

    >>> spatial_score(torch.tensor([[0, 4, 2, 1]]), torch.tensor([[0, 8, 4, 2]]), (2, 4), 3.0).tolist()
    [[0.8125, 0.8125, 0.25, 0.0]]
    """
    best = torch.zeros(row.shape, dtype=torch.float32, device=row.device)
    for stride in strides:
        score = min(1.0, max(0.0, 1 - lambda_sample / stride**2))
        best = torch.where(on_grid(row, col, stride), best.clamp(min=score), best)
    return best


def on_grid(row: Tensor, col: Tensor, stride: int) -> Tensor:
    """Whether a token lies on the sampling grid of this stride, anchored at the top left of its crop. bool [I, N]."""
    return (row % stride == 0) & (col % stride == 0)


# --- features
def pool_bins(scores: Tensor, mask: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling of each item's masked scores, in order, to [I, bins] float32; 0 for an empty item.

    Of n values bin b averages floor(b * n / bins) .. ceil((b + 1) * n / bins) - 1, so bins overlap when n < bins.

    >>> pool_bins(torch.tensor([[1.0, 9.0, 2.0, 3.0]]), torch.tensor([[True, False, True, True]]), 2).tolist()
    [[1.5, 2.5]]
    """
    width = scores.shape[1]
    packed = scores.float().gather(1, front_pack(mask, width))
    count = mask.sum(1)[:, None]
    bin_ = torch.arange(bins, device=scores.device)
    first = bin_ * count // bins
    last = -(-(bin_ + 1) * count // bins)  # [I, bins]
    steps = torch.arange(width // bins + 2, device=scores.device)
    place = first[..., None] + steps
    inside = place < last[..., None]
    value = packed[:, None].expand(-1, bins, -1).gather(2, place.clamp(max=width - 1))
    return (value * inside).sum(2) / inside.sum(2).clamp(min=1)


def masked_mean(scores: Tensor, mask: Tensor) -> Tensor:
    """Mean of each item's masked scores, [I] float32; 0 for an empty item."""
    return (scores.float() * mask).sum(1) / mask.sum(1).clamp(min=1)


# --- masks
def soft_keep(redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, temperature: float) -> Tensor:
    """max of the two sigmoids of (score - threshold) * temperature: the differentiable mask, [I, N] in (0, 1).

    theta_r, theta_s: [I].
    """
    by_redundancy = torch.sigmoid((redundancy - theta_r[:, None]) * temperature)
    return torch.maximum(by_redundancy, torch.sigmoid((spatial - theta_s[:, None]) * temperature))


def hard_keep(redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, mask: Tensor) -> Tensor:
    """Keep a token whose redundancy or spatial score exceeds its threshold; if none does, the best one. bool [I, N].

    theta_r, theta_s: [I]. The best one is that of the highest redundancy score, the lower index among equals.

    >>> scores, none = torch.tensor([[0.1, 0.6, 0.6]]), torch.zeros(1, 3)
    >>> hard_keep(scores, none, torch.tensor([0.7]), torch.tensor([0.5]), torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[False, True, False]]
    """
    passed = mask & ((redundancy > theta_r[:, None]) | (spatial > theta_s[:, None]))
    best = top_k(redundancy, mask.new_ones(len(mask), dtype=torch.long), mask, most=1)
    return torch.where(passed.any(1, keepdim=True), passed, best)


def masked_softmax(logits: Tensor, weights: Tensor) -> Tensor:
    """Causal softmax in which key j counts weights[j], the row's own key always 1. [..., Q, Q] float32.

    logits: [..., Q, Q] scaled products. weights: [..., Q], at least `FLOOR` is used. The reference for soft masks
    inside attention; the engine hands the same logarithms to the model's own kernel.
    """
    length = logits.shape[-1]
    own = torch.eye(length, dtype=torch.bool, device=logits.device)
    visible = torch.ones_like(own).tril()
    bias = weights.float().clamp(min=FLOOR).log()[..., None, :].masked_fill(own, 0)
    return (logits.float() + bias).masked_fill(~visible, -math.inf).softmax(-1)


# --- losses
def mean_over_layers(kept: Tensor, tokens: Tensor, layers: Sequence[int], depth: int) -> Tensor:
    """Mean number of tokens entering the LLM's `depth` layers: [M, ...] kept behind each of `layers` -> [...].

    tokens: [...] before pruning; layers up to and including the first module's see them all.

    >>> mean_over_layers(torch.tensor([135.0, 31.0, 7.0]), torch.tensor(576.0), (4, 14, 24), 32).item()
    143.40625
    """
    ends = [*layers[1:], depth - 1]
    spans = put([end - at for at, end in zip(layers, ends, strict=True)], kept.device)
    spent = (kept * spans.view(-1, *[1] * (kept.ndim - 1))).sum(0)
    return (tokens * (layers[0] + 1) + spent) / depth


def depth_loss(kept: Tensor, tokens: Tensor, layers: Sequence[int]) -> Tensor:
    """Share of tokens behind each module times its layer, summed: deep modules are pushed hardest. [M, I] -> scalar.

    The mean over the items is taken last.
    """
    depth = put(layers, kept.device, kept.dtype)
    return (depth @ (kept / tokens)).mean()


def target_loss(mean: Tensor, target: float) -> Tensor:
    """Distance of the batch's mean number of tokens ([I] per item) from the target, in tokens; a scalar."""
    return (mean.mean() - target).abs()


# --- budgets
@functools.lru_cache(CACHED)
def decay(
    tokens: float, granted: float, layers: tuple[int, ...], depth: int, *, fixed: float = 0, of: int | None = None
) -> tuple[float, ...]:
    """``tokens * alpha^m`` behind modules m = 1..M, unrounded, with the alpha in [0, 1] that meets the budget.

    granted: mean over the LLM's `depth` layers, `fixed` separators included, of the `of` tokens in the input. Raises
    BudgetError where the layers up to the first module alone use more.

    >>> [round(count, 2) for count in decay(576, 144, (4, 14, 24), 32)]
    [135.61, 31.93, 7.52]
    """
    ends = [*layers[1:], depth - 1]
    spans = [layers[0] + 1, *(end - at for at, end in zip(layers, ends, strict=True))]

    def curve(alpha: float) -> list[float]:
        return [tokens * alpha**module for module in range(len(spans))]

    return tuple(spend(depth * min(granted, tokens + fixed), spans, curve, fixed=fixed, of=of)[1:])


def decay_counts(
    tokens: int, granted: int, layers: tuple[int, ...], depth: int, *, fixed: float = 0, of: int | None = None
) -> list[int]:
    """``max(1, floor(tokens * alpha^m))`` for m = 1..M; arguments as in `decay`.

    >>> decay_counts(576, 144, (4, 14, 24), 32)
    [135, 31, 7]
    """
    kept = decay(tokens, granted, layers, depth, fixed=fixed, of=of)
    return [max(1, math.floor(count + NOISE)) for count in kept]


def sampling_grid(
    row: Tensor, col: Tensor, strides: Sequence[int], spatial_share: float, keep: Tensor, mask: Tensor
) -> Tensor:
    """Alive tokens on the densest grid that takes at most `spatial_share` of an item's `keep` [I]. bool [I, N].

    Empty where no grid is sparse enough.
    """
    chosen = torch.zeros_like(mask)
    for stride in sorted(strides, reverse=True):
        grid = on_grid(row, col, stride) & mask
        chosen = torch.where((grid.sum(1) <= spatial_share * keep)[:, None], grid, chosen)
    return chosen


def budget_keep(redundancy: Tensor, grid: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    """All tokens of `grid` [I, N] and the best others up to `keep` [I] tokens per item; ties to the lower index."""
    return top_k(redundancy.float().masked_fill(grid & mask, math.inf), keep, mask)
