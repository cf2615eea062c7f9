"""Rows of the attention matrix from queries and keys, without ever holding the whole matrix."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vtc.ops.host import put

CHUNK = 256
Heads = Literal["mean", "max", "groups"]
"""How the weights of all heads become one; or, for "groups", one for every KV head, the mean over its query heads."""


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    heads: Heads = "mean",
    chunk: int = CHUNK,
) -> Tensor:
    """Softmax attention of the chosen query rows, mean over heads, in float32.

    query: [B, Hq, Q, D], key: [B, Hk, K, D], both after rotary embedding; Hq is a multiple of Hk (grouped queries).
    rows: [B, R] query indices. mask: [B, 1|Hq, Q, K] bool or additive, or [B, K] bool (False is never attended).
    causal: query i sees keys up to i + K - Q. heads: see `Heads`. Returns [B, R, K], of groups [B, Hk, R, K]; each row
    of means sums to one.
    """
    parts = [_rows(query, key, part, scaling, mask, causal, heads) for part in torch.split(rows, chunk, dim=1)]
    return torch.cat(parts, dim=-2)


def attention_received(
    query: Tensor,
    key: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Mean attention each key receives over all queries and heads; shapes as in `attention_rows`, returns [B, K].

    Streams over the queries: memory is [B, H, chunk, K], never [Q, K] at once. segments: [S + 1] ends of the sequences
    packed along Q = K of a batch of one, starting with 0; a key then receives from its own sequence only.
    Synchronises once.
    """
    if segments is not None:
        return _received_in_segments(query, key, scaling, segments, chunk)
    batch, _, length, _ = query.shape
    total = query.new_zeros(batch, key.shape[2], dtype=torch.float32)
    for start in range(0, length, chunk):
        rows = torch.arange(start, min(start + chunk, length), device=query.device).expand(batch, -1)
        total = total + _rows(query, key, rows, scaling, mask, False).sum(1)
    return total / length


def _received_in_segments(query: Tensor, key: Tensor, scaling: float, segments: Tensor, chunk: int) -> Tensor:
    ends: list[int] = segments.tolist()
    starts: dict[int, list[int]] = {}
    for start, end in pairwise(ends):
        starts.setdefault(end - start, []).append(start)
    total = query.new_zeros(1, key.shape[2], dtype=torch.float32)
    for length, same in starts.items():  # sequences of one length form a batch
        if length:
            steps = torch.arange(length, device=query.device)
            place = put(same, query.device)[:, None] + steps
            q, k = query[0][:, place].transpose(0, 1), key[0][:, place].transpose(0, 1)
            total[0, place] = attention_received(q, k, scaling, chunk=max(1, chunk // len(same)))
    return total


def attention_sums(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    heads: Heads = "mean",
    chunk: int = CHUNK,
) -> Tensor:
    """Weighted sums of attention rows: softmax attention, mean over heads, times weights, summed over the queries.

    weights: [G, B, Q], one weight per query and sum. heads: see `Heads`. Other shapes as in `attention_rows`; returns
    [G, B, K] float32, of groups [G, B, Hk, K]. Streams over the queries: memory is [B, H, chunk, K].
    """
    batch, length = query.shape[0], query.shape[2]
    each = key.shape[1:2] if heads == "groups" else ()
    total = query.new_zeros(weights.shape[0], batch, *each, key.shape[2], dtype=torch.float32)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        rows = torch.arange(start, end, device=query.device).expand(batch, -1)
        part = _rows(query, key, rows, scaling, mask, causal, heads)
        total = total + torch.einsum("gbq,b...qk->gb...k", weights[..., start:end].float(), part)
    return total


def attention_logits(
    query: Tensor, key: Tensor, rows: Tensor, scaling: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled products of the chosen query rows with all keys, per head, in float32: [B, Hq, R, K].

    Arguments as in `attention_rows`; what the mask or causality hides is the lowest float.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    index = rows[:, None, :, None]
    # The heads that share keys stand one behind the other, so that no key is repeated in memory.
    q = query.gather(2, index.expand(batch, heads, -1, width)).reshape(batch, groups, -1, width)
    logits = torch.matmul(q, key.transpose(-1, -2)).float() * scaling
    logits = logits.view(batch, heads, -1, keys)
    lowest = torch.finfo(torch.float32).min
    if mask is not None and mask.ndim == 4:
        picked = mask.expand(batch, mask.shape[1], length, -1)[..., :keys]
        picked = picked.gather(2, index.expand(batch, mask.shape[1], -1, keys))
        logits = logits.masked_fill(~picked, lowest) if picked.dtype == torch.bool else logits + picked.float()
    elif mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, -keys:].bool(), lowest)
    if causal:
        visible = torch.arange(keys, device=query.device) <= index + (keys - length)
        logits = logits.masked_fill(~visible, lowest)
    return logits


def soft_mask(weights: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [B, 1, L, L] in which key j counts weights[j] times, and fully for its own query.

    weights: [B, L] in (0, 1], at least 1e-6 is used. mask: [B, 1, L, L] bool or additive, None for plain causality.
    ``P_ij = exp(l_ij) G_ij / sum_k exp(l_ik) G_ik`` with ``G_ij = weights[j]`` for i != j and ``G_ii = 1``.
    """
    length = weights.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=weights.device)
    bias = weights.float().clamp(min=1e-6).log()[:, None, None, :].masked_fill(own, 0)
    if mask is None:
        mask = torch.ones_like(own).tril()[None, None]
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(dtype).min).to(dtype)
    return (bias + mask.float()).clamp(min=torch.finfo(dtype).min).to(dtype)


def _rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    heads: Heads = "mean",
) -> Tensor:
    weights = attention_logits(query, key, rows, scaling, mask=mask, causal=causal).softmax(-1)
    if heads == "groups":
        return weights.view(len(key), key.shape[1], -1, *weights.shape[2:]).mean(2)
    return weights.mean(1) if heads == "mean" else weights.amax(1)
