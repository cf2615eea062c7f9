"""The dual-attention filter, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtc.method.groups import Parts
from vtc.methods.mustdrop.dual import attention_sum_and_max, dual_filter, keep_with_keys, key_tokens, utilities
from vtc.ops.select import in_groups
from vtc.testing.plain import OpCase, Size


def plain_attention_sum_and_max(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    real: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Every query row's softmax by itself, head by head."""
    batch, heads, length, _ = query.shape
    keys = key.shape[2]
    total, peak = torch.zeros(batch, keys), torch.zeros(batch, keys)
    for b in range(batch):
        chosen = [row for row, there in zip(rows[b].tolist(), real[b].tolist(), strict=True) if there]
        for row in chosen:
            mean = torch.zeros(keys)
            for head in range(heads):
                logits = key[b, head * key.shape[1] // heads].float() @ query[b, head, row].float() * scaling
                if mask is not None:
                    logits[~mask[b]] = -torch.inf
                if causal:
                    logits[row + keys - length + 1 :] = -torch.inf
                mean = mean + logits.softmax(0) / heads
            total[b], peak[b] = total[b] + mean, torch.maximum(peak[b], mean)
    return torch.stack([total, peak])


def plain_key_tokens(score: Tensor, tiles: Parts, rate: float) -> Tensor:
    """Sort every tile and take its first ceil(rate * size)."""
    assert tiles.place is not None
    chosen = torch.zeros_like(tiles.items)
    for item, places in enumerate(tiles.place.view(len(score), -1, tiles.place.shape[1])):
        for place, real in zip(places, tiles.mask.view(len(score), *places.shape)[item], strict=True):
            members = place[real].tolist()
            members.sort(key=lambda p: (-float(score[item, p]), p))
            chosen[item, members[: math.ceil(rate * len(members))]] = True
    return chosen


def plain_dual_filter(total: Tensor, peak: Tensor, gamma: float, alpha: float, mask: Tensor) -> Tensor:
    """Drop a token if g_j < gamma * sum g and m_j < alpha."""
    keep = torch.zeros_like(mask)
    for item, there in enumerate(mask.tolist()):
        members = [p for p, real in enumerate(there) if real]
        whole = sum(float(total[item, p]) for p in members)
        for p in members:
            candidate = float(total[item, p]) < gamma * whole and float(peak[item, p]) < alpha
            keep[item, p] = not candidate
    return keep


def plain_utilities(total: Tensor, peak: Tensor, gamma: float, alpha: float, mask: Tensor) -> Tensor:
    """u_j = max(g_j / (gamma * sum g), m_j / alpha)."""
    utility = torch.zeros(mask.shape)
    for item, there in enumerate(mask.tolist()):
        members = [p for p, real in enumerate(there) if real]
        whole = sum(float(total[item, p]) for p in members)
        for p in members:
            share = float(total[item, p]) / (gamma * whole) if whole > 0 else 0.0
            utility[item, p] = max(share, float(peak[item, p]) / alpha)
    return utility


def plain_keep_with_keys(utility: Tensor, key: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    """Key tokens first, then by falling utility, then by index."""
    chosen = torch.zeros_like(mask)
    for item, there in enumerate(mask.tolist()):
        members = [p for p, real in enumerate(there) if real]
        members.sort(key=lambda p: (not key[item, p], -float(utility[item, p]), p))
        chosen[item, members[: int(keep[item])]] = True
    return chosen


def attention(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and maximum of made-up text rows over the tokens of items of several sizes, and the items' mask."""
    counts, text, width = ([576] * 64, 40, 576) if size == "large" else ([13, 1, 9, 0], 5, 13)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(counts), text, width + 20, generator=generator).mul(2).softmax(-1)[..., :width]
    mask = torch.arange(width) < torch.tensor(counts)[:, None]
    return rows.sum(1), rows.amax(1), mask


def make_attention(size: Size) -> dict[str, Any]:
    batch, heads, length, keys, some = (2, 16, 700, 700, 300) if size == "large" else (2, 4, 9, 11, 5)
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(length, generator=generator)[:some].sort().values for _ in range(batch)])
    mask = torch.ones(batch, keys, dtype=torch.bool)
    mask[1, : keys - length + int(rows[1, 0])] = False
    return {
        "query": torch.randn(batch, heads, length, 8, generator=generator),
        "key": torch.randn(batch, heads // 2, keys, 8, generator=generator),
        "rows": rows,
        "real": torch.arange(some) < torch.tensor([some, some - 2])[:, None],
        "scaling": 0.6,
        "mask": mask,
        "causal": True,
        "chunk": 64 if size == "large" else 2,
    }


def make_keys(size: Size) -> dict[str, Any]:
    total, _, mask = attention(size)
    width = 96 if size == "large" else 5
    group = torch.arange(mask.shape[1]).expand_as(mask) // width
    place, real = in_groups(group, int(group.max()) + 1, width, mask)
    return {
        "score": total.mul(64).round(),  # ties
        "tiles": Parts(real.flatten(0, 1), place.flatten(0, 1), mask),
        "rate": 0.08 if size == "large" else 0.3,
    }


def make_filter(size: Size) -> dict[str, Any]:
    total, peak, mask = attention(size)
    gamma, alpha = (0.0017, 0.015) if size == "large" else (0.08, 0.1)
    return {"total": total, "peak": peak, "gamma": gamma, "alpha": alpha, "mask": mask}


def make_budget(size: Size) -> dict[str, Any]:
    given, chosen = make_filter(size), make_keys(size)
    return {
        "utility": utilities(**given).mul(4).round(),  # ties
        "key": key_tokens(**chosen),
        "keep": given["mask"].sum(1) // 3,
        "mask": given["mask"],
    }


CASES = (
    OpCase(attention_sum_and_max, plain_attention_sum_and_max, make_attention, 1e-5),
    OpCase(key_tokens, plain_key_tokens, make_keys),
    OpCase(dual_filter, plain_dual_filter, make_filter),
    OpCase(utilities, plain_utilities, make_filter, 1e-6),
    OpCase(keep_with_keys, plain_keep_with_keys, make_budget),
)
