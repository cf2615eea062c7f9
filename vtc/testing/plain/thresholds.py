"""References for `vtc.methods.atp.thresholds`: one item, one token at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.methods.atp import thresholds as ops
from vtc.testing.plain import OpCase, Size


def _rows(*tables: Tensor) -> Any:
    return zip(*(table.tolist() for table in tables), strict=True)


def min_max(scores: Tensor, mask: Tensor) -> Tensor:
    out = []
    for row, real in _rows(scores, mask):
        values = [value for value, here in zip(row, real, strict=True) if here]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        scaled = [(value - low) / (high - low + 1e-12) if values else 0.0 for value in row]
        out.append([min(1.0, max(0.0, value)) for value in scaled])
    return torch.tensor(out)


def redundancy_score(own: Tensor, cross: Tensor) -> Tensor:
    return torch.tensor([[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in _rows(own, cross)])


def on_grid(row: Tensor, col: Tensor, stride: int) -> Tensor:
    return torch.tensor(
        [[not (r % stride or c % stride) for r, c in zip(x, y, strict=True)] for x, y in _rows(row, col)]
    )


def spatial_score(row: Tensor, col: Tensor, strides: Sequence[int], lambda_sample: float) -> Tensor:
    def score(r: int, c: int) -> float:
        rates = [1 / stride**2 for stride in strides if r % stride == 0 and c % stride == 0]
        return max([min(1.0, max(0.0, 1 - lambda_sample * rate)) for rate in rates], default=0.0)

    return torch.tensor([[score(r, c) for r, c in zip(x, y, strict=True)] for x, y in _rows(row, col)])


def pool_bins(scores: Tensor, mask: Tensor, bins: int) -> Tensor:
    out = []
    for row, real in _rows(scores, mask):
        values = [value for value, here in zip(row, real, strict=True) if here]
        ends = [(b * len(values) // bins, math.ceil((b + 1) * len(values) / bins)) for b in range(bins)]
        out.append([sum(values[a:b]) / (b - a) if values else 0.0 for a, b in ends])
    return torch.tensor(out)


def masked_mean(scores: Tensor, mask: Tensor) -> Tensor:
    out = []
    for row, real in _rows(scores, mask):
        values = [value for value, here in zip(row, real, strict=True) if here]
        out.append(sum(values) / len(values) if values else 0.0)
    return torch.tensor(out)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def soft_keep(redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, temperature: float) -> Tensor:
    out = []
    for reds, spaces, low, sparse in _rows(redundancy, spatial, theta_r, theta_s):
        pairs = zip(reds, spaces, strict=True)
        out.append([max(_sigmoid((r - low) * temperature), _sigmoid((s - sparse) * temperature)) for r, s in pairs])
    return torch.tensor(out)


def hard_keep(redundancy: Tensor, spatial: Tensor, theta_r: Tensor, theta_s: Tensor, mask: Tensor) -> Tensor:
    out = []
    for reds, spaces, low, sparse, real in _rows(redundancy, spatial, theta_r, theta_s, mask):
        kept = [m and (r > low or s > sparse) for r, s, m in zip(reds, spaces, real, strict=True)]
        if not any(kept) and any(real):
            best = min((place for place, m in enumerate(real) if m), key=lambda place: (-reds[place], place))
            kept[best] = True
        out.append(kept)
    return torch.tensor(out)


def masked_softmax(logits: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(logits.shape, dtype=torch.float64)
    for i in range(logits.shape[-1]):
        seen = [
            logits[..., i, j].double().exp() * (1.0 if i == j else weights[..., j].double().clamp(min=1e-6))
            for j in range(i + 1)
        ]
        total = torch.stack(seen).sum(0)
        for j, value in enumerate(seen):
            out[..., i, j] = value / total
    return out


def mean_over_layers(kept: Tensor, tokens: Tensor, layers: Sequence[int], depth: int) -> Tensor:
    """Walk through the layers and add what enters each."""
    total = torch.zeros_like(tokens, dtype=torch.float64)
    for layer in range(depth):
        behind = [m for m, at in enumerate(layers) if at < layer]
        total = total + (kept[behind[-1]] if behind else tokens)
    return total / depth


def depth_loss(kept: Tensor, tokens: Tensor, layers: Sequence[int]) -> Tensor:
    items = range(kept.shape[1])
    each = [sum(float(kept[m, i]) / float(tokens[i]) * at for m, at in enumerate(layers)) for i in items]
    return torch.tensor(sum(each) / len(each))


def target_loss(mean: Tensor, target: float) -> Tensor:
    values = mean.tolist()
    return torch.tensor(abs(sum(values) / len(values) - target))


def sampling_grid(
    row: Tensor, col: Tensor, strides: Sequence[int], spatial_share: float, keep: Tensor, mask: Tensor
) -> Tensor:
    out = []
    for rows, cols, count, real in _rows(row, col, keep, mask):
        chosen = [False] * len(rows)
        for stride in sorted(strides):
            grid = [m and r % stride == 0 and c % stride == 0 for r, c, m in zip(rows, cols, real, strict=True)]
            if sum(grid) <= spatial_share * count:
                chosen = grid
                break
        out.append(chosen)
    return torch.tensor(out)


def budget_keep(redundancy: Tensor, grid: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    out = []
    for reds, lies, count, real in _rows(redundancy, grid, keep, mask):
        places = sorted(
            (p for p, m in enumerate(real) if m), key=lambda p: (not lies[p], 0 if lies[p] else -reds[p], p)
        )
        out.append([place in places[:count] for place in range(len(reds))])
    return torch.tensor(out)


# --- calls
def _table(size: Size, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores with ties and a mask; the last of the small items is empty."""
    items, tokens = (4, 37) if size == "small" else (64, 2880)
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(items, tokens, generator=generator) * 20).round() / 20
    lengths = torch.tensor([tokens, tokens - 6, 1, 0] * (items // 4))
    return scores, torch.arange(tokens) < lengths[:, None]


def _places(size: Size) -> tuple[Tensor, Tensor]:
    items, tokens = _table(size)[0].shape
    place = torch.arange(tokens).expand(items, -1)
    side = 7 if size == "small" else 54
    return place // side, place % side


def _scores(size: Size) -> dict[str, Any]:
    scores, mask = _table(size)
    return {"scores": scores, "mask": mask}


def _pair(size: Size) -> dict[str, Any]:
    return {"own": _table(size)[0], "cross": _table(size, 1)[0]}


def _on_grid(size: Size) -> dict[str, Any]:
    row, col = _places(size)
    return {"row": row, "col": col, "stride": 2}


def _spatial(size: Size) -> dict[str, Any]:
    row, col = _places(size)
    return {"row": row, "col": col, "strides": (2, 3, 4), "lambda_sample": 3.0}


def _pool(size: Size) -> dict[str, Any]:
    return {**_scores(size), "bins": 11 if size == "small" else 256}


def _soft(size: Size) -> dict[str, Any]:
    items = len(_table(size)[0])
    theta = torch.linspace(0.1, 1.0, items)
    tables = {"redundancy": _table(size)[0], "spatial": _table(size, 1)[0]}
    return {**tables, "theta_r": theta, "theta_s": theta.flip(0), "temperature": 10.0}


def _hard(size: Size) -> dict[str, Any]:
    given = _soft(size)
    del given["temperature"]
    return {**given, "mask": _table(size)[1]}


def _logits(size: Size) -> dict[str, Any]:
    batch, length = (2, 9) if size == "small" else (8, 160)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(batch, length, generator=generator) * (torch.arange(length) % 4 > 0)
    return {"logits": torch.randn(batch, length, length, generator=generator), "weights": weights}


def _kept(size: Size) -> Tensor:
    items = 5 if size == "small" else 20_000
    return torch.rand(3, items, generator=torch.Generator().manual_seed(0)).mul(576).sort(0, descending=True).values


def _means(size: Size) -> dict[str, Any]:
    kept = _kept(size)
    return {"kept": kept, "tokens": torch.full(kept.shape[1:], 576.0), "layers": (0, 5, 6), "depth": 11}


def _depths(size: Size) -> dict[str, Any]:
    given = _means(size)
    del given["depth"]
    return given


def _sampling(size: Size) -> dict[str, Any]:
    row, col = _places(size)
    keep = torch.tensor([20, 9, 1, 3] if size == "small" else [700, 96, 4, 0] * 16)
    return {
        **{"row": row, "col": col, "strides": (2, 4, 8), "spatial_share": 0.5},
        **{"keep": keep, "mask": _table(size)[1]},
    }


def _budget(size: Size) -> dict[str, Any]:
    given = _sampling(size)
    grid = sampling_grid(**given)
    return {"redundancy": _table(size)[0], "grid": grid, "keep": given["keep"], "mask": given["mask"]}


CASES = (
    OpCase(ops.min_max, min_max, _scores, 1e-6),
    OpCase(ops.redundancy_score, redundancy_score, _pair, 1e-6),
    OpCase(ops.on_grid, on_grid, _on_grid),
    OpCase(ops.spatial_score, spatial_score, _spatial, 1e-6),
    OpCase(ops.pool_bins, pool_bins, _pool, 1e-6),
    OpCase(ops.masked_mean, masked_mean, _scores, 1e-6),
    OpCase(ops.soft_keep, soft_keep, _soft, 1e-6),
    OpCase(ops.hard_keep, hard_keep, _hard),
    OpCase(ops.masked_softmax, masked_softmax, _logits, 1e-6),
    OpCase(ops.mean_over_layers, mean_over_layers, _means, 1e-6),
    OpCase(ops.depth_loss, depth_loss, _depths, 1e-6),
    OpCase(ops.target_loss, target_loss, lambda size: {"mean": _kept(size)[0], "target": 144.0}, 1e-5),
    OpCase(ops.sampling_grid, sampling_grid, _sampling),
    OpCase(ops.budget_keep, budget_keep, _budget),
)
