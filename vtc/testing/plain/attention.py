"""References for `vtc.ops.attention`: softmax rows one query, one head and one key at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtc.ops.attention import Heads, attention_logits, attention_received, attention_rows, attention_sums, soft_mask
from vtc.testing.plain import OpCase, Size


def _logits(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None, causal: bool) -> Tensor:
    """[B, Hq, Q, K] scaled products in float64, -inf where nothing is seen."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    logits = torch.full((batch, heads, queries, keys), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h * key.shape[1] // heads
            for i in range(queries):
                for j in range(keys):
                    hidden = (mask is not None and not mask[b, j]) or (causal and j > i + keys - queries)
                    if not hidden:
                        logits[b, h, i, j] = float(query[b, h, i].double() @ key[b, group, j].double()) * scaling
    return logits


def plain_logits(query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> Tensor:
    """``l_ij = scaling q_i k_j`` of the chosen rows."""
    logits = _logits(query, key, scaling, None, False)
    return torch.stack([logits[b][:, index] for b, index in enumerate(rows)]).float()


def _joined(attention: Tensor, key: Tensor, heads: Heads) -> Tensor:
    """[B, Hq, Q, K] as the mean over heads, the largest of them, or the mean over those that read each KV head."""
    if heads == "mean":
        return attention.mean(1)
    if heads == "max":
        return attention.max(1).values
    groups, count = key.shape[1], attention.shape[1]
    members = [[h for h in range(count) if h * groups // count == group] for group in range(groups)]
    return torch.stack([attention[:, each].mean(1) for each in members], 1)


def plain_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    heads: Heads = "mean",
) -> Tensor:
    """``mean_h softmax_j(l_hij)`` of the chosen rows."""
    weights = _joined(_logits(query, key, scaling, mask, causal).softmax(-1), key, heads)
    return torch.stack([weights[b][..., index, :] for b, index in enumerate(rows)]).float()


def plain_received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """``mean_i mean_h softmax_j(l_hij)``."""
    return _logits(query, key, scaling, None, False).softmax(-1).mean((1, 2)).float()


def plain_sums(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    heads: Heads = "mean",
) -> Tensor:
    """``sum_i w_i mean_h softmax_j(l_hij)``, for every set of weights."""
    attention = _joined(_logits(query, key, scaling, mask, causal).softmax(-1), key, heads)
    total = torch.zeros(*weights.shape[:2], *attention.shape[1:-2], key.shape[2], dtype=torch.float64)
    for g in range(weights.shape[0]):
        for b in range(weights.shape[1]):
            for i in range(weights.shape[2]):
                total[g, b] += float(weights[g, b, i]) * attention[b, ..., i, :]
    return total.float()


def plain_soft_mask(weights: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``log G_ij`` where row i sees key j, the lowest float elsewhere."""
    batch, length = weights.shape
    bias = torch.full((batch, 1, length, length), torch.finfo(dtype).min, dtype=dtype)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                if mask is None or mask[b, 0, i, j]:
                    bias[b, 0, i, j] = 0.0 if i == j else math.log(max(float(weights[b, j]), 1e-6))
    return bias


def _given(size: Size, *, rows: int | None = None, masked: bool = False, groups: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    batch, heads, length = (2, 4, 7) if size == "small" else (2, 4, 96)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    given: dict[str, Any] = {"query": draw(batch, heads, length, 8), "key": draw(batch, 2, length, 8), "scaling": 0.4}
    if rows is not None:
        given["rows"] = torch.randint(length, (batch, rows), generator=generator)
    if groups is not None:
        given["weights"] = torch.rand(groups, batch, length, generator=generator)
    if masked:
        given["mask"] = torch.arange(length).expand(batch, -1) >= torch.tensor([[2], [0]])
        given["causal"] = True
    return given


def _soft(size: Size) -> dict[str, Any]:
    length = 9 if size == "small" else 300
    generator = torch.Generator().manual_seed(5)
    seen = torch.rand(2, 1, length, length, generator=generator) < 0.9
    visible = torch.tril(seen) | torch.eye(length, dtype=torch.bool)
    return {"weights": torch.rand(2, length, generator=generator), "mask": visible, "dtype": torch.float32}


CASES = (
    OpCase(attention_logits, plain_logits, lambda size: _given(size, rows=3), 1e-5),
    OpCase(attention_rows, plain_rows, lambda size: _given(size, rows=5), 1e-5),
    OpCase(attention_received, plain_received, lambda size: _given(size), 1e-5),
    OpCase(attention_sums, plain_sums, lambda size: _given(size, groups=2), 1e-5),
    OpCase(soft_mask, plain_soft_mask, _soft, 1e-6),
)
