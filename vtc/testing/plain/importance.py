"""PageRank on whole attention matrices, one query and one head at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops import pagerank as ops
from vtc.testing.plain import OpCase, Size


def pagerank(
    query: Tensor,
    key: Tensor,
    scaling: float,
    *,
    tau: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    mask: Tensor | None = None,
    causal: bool = False,
    voters: Tensor | None = None,
) -> Tensor:
    """In double precision. A query's row is the softmax over the keys it sees, of logits divided by tau."""
    batch, heads, length, _ = query.shape
    groups, keys = key.shape[1], key.shape[2]
    found = torch.zeros(batch, length, dtype=torch.float64)
    for b in range(batch):
        votes = [True] * length if voters is None else voters[b].tolist()
        begin = torch.tensor([1.0 / max(1, sum(votes)) if vote else 0.0 for vote in votes], dtype=torch.float64)
        for h in range(heads):
            shared = key[b, h * groups // heads].double()
            matrix = torch.zeros(length, length, dtype=torch.float64)
            for i in range(length):
                logits = shared @ query[b, h, i].double() * scaling
                seen = torch.ones(keys, dtype=torch.bool)
                if mask is not None and mask.ndim == 2:
                    seen &= mask[b, -keys:]
                elif mask is not None and mask.dtype == torch.bool:
                    seen &= mask[b, h % mask.shape[1], i, :keys]
                elif mask is not None:
                    logits = logits + mask[b, h % mask.shape[1], i, :keys]
                if causal:
                    seen &= torch.arange(keys) <= i + keys - length
                if seen.any():
                    sharp = torch.where(seen, logits / tau, -torch.inf)
                    matrix[i] = sharp.softmax(0)[keys - length :]
            mass = begin
            for _ in range(iterations):
                mass = (1 - damping) * (mass @ matrix) + damping * begin
            found[b] += mass.square() / heads
    return found.sqrt().float()


def _case(size: Size) -> dict[str, Any]:
    batch, heads, length, width = (2, 4, 13, 8) if size == "small" else (1, 8, 800, 32)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, length, width, generator=generator)
    key = torch.randn(batch, heads // 2, length, width, generator=generator)
    valid = torch.arange(length) >= torch.tensor([3, 0][:batch])[:, None]
    return {"query": query, "key": key, "scaling": width**-0.5, "causal": True, "mask": valid, "voters": valid}


CASES = (OpCase(ops.pagerank, pagerank, _case, 1e-5),)
