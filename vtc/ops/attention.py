"""Rows of the attention matrix from queries and keys, without ever holding the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vtc.ops.blocks import at_once
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
    chunk: int | None = None,
) -> Tensor:
    """Mean attention each key receives over all queries and heads; shapes as in `attention_rows`, returns [B, K].

    Streams over the queries as `attention_sums`. segments: [S + 1] ends of the sequences packed along Q = K of a batch
    of one, starting with 0; a key then receives from its own sequence only. Synchronises once then.
    """
    if segments is not None:
        return _received_in_segments(query, key, scaling, segments, chunk)
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for _, part in _stream(query, key, scaling, mask, False, "mean", chunk):
        total += part.sum((1, 2))
    return total / (query.shape[1] * query.shape[2])


def _received_in_segments(query: Tensor, key: Tensor, scaling: float, segments: Tensor, chunk: int | None) -> Tensor:
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
            total[0, place] = attention_received(q, k, scaling, chunk=chunk)
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
    chunk: int | None = None,
) -> Tensor:
    """Weighted sums of attention rows: softmax attention, mean over heads, times weights, summed over the queries.

    weights: [G, B, Q], one weight per query and sum, 0 of queries that see nothing. heads: see `Heads`. Other shapes as
    in `attention_rows`; returns [G, B, K] float32, of groups [G, B, Hk, K]. Streams over the queries, `chunk` at a time
    or as many as `blocks.at_once` allows: memory is [B, H, chunk, K], and keys that no query of a block sees are left
    out of it.
    """
    joined = _joined(key, heads)
    total = query.new_zeros(len(key), joined, len(weights), key.shape[2], dtype=torch.float32)
    for span, part in _stream(query, key, scaling, mask, causal, heads, chunk):
        weight = weights[:, :, None, span].float().transpose(0, 1)
        weight = weight.expand(-1, -1, part.shape[2] // weight.shape[3], -1).flatten(2)
        total[..., : part.shape[3]] += torch.matmul(weight[:, None], part)
    total = total if heads == "max" else total * (joined / query.shape[1])
    return total.movedim(2, 0) if heads == "groups" else total[:, 0].transpose(0, 1)


def _joined(key: Tensor, heads: Heads) -> int:
    """How many rows of weights the heads of a query become."""
    return key.shape[1] if heads == "groups" else 1


def _stream(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None,
    causal: bool,
    heads: Heads,
    chunk: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Queries that follow one another, with their attention [B, 1 or Hk, n, K'] to the K' keys that any of them sees.

    n rows: those of all heads that become one, head by head, so that a sum over them is a product with the weights.
    """
    batch, every, length, _ = query.shape
    chunk = chunk or at_once(batch * every * key.shape[2], query.device)
    query, key = query.contiguous(), key.contiguous()  # else every product copies them
    for start in range(0, length, chunk):
        span = slice(start, min(start + chunk, length))
        part = _span(query, key, span, scaling, mask, causal).softmax(-1)
        part = part.amax(1, keepdim=True) if heads == "max" else part
        yield span, part.view(batch, _joined(key, heads), -1, part.shape[-1])


def attention_logits(
    query: Tensor, key: Tensor, rows: Tensor, scaling: float, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled products of the chosen query rows with all keys, per head, in float32: [B, Hq, R, K].

    Arguments as in `attention_rows`; what the mask or causality hides is the lowest float.
    """
    batch, heads, length, width = query.shape
    keys, index = key.shape[2], rows[:, None, :, None]
    logits = _products(query.gather(2, index.expand(batch, heads, -1, width)), key, scaling)
    if mask is not None and mask.ndim == 4:
        picked = mask.expand(batch, mask.shape[1], length, -1)[..., :keys]
        logits = _hide(logits, picked.gather(2, index.expand(batch, mask.shape[1], -1, keys)))
    elif mask is not None:
        logits = _hide(logits, mask[:, None, None, -keys:].bool())
    if causal:
        logits = _hide(logits, torch.arange(keys, device=query.device) <= index + (keys - length))
    return logits


def _span(query: Tensor, key: Tensor, rows: slice, scaling: float, mask: Tensor | None, causal: bool) -> Tensor:
    """As `attention_logits`, of rows that follow one another and the keys up to the last one that they see."""
    length, keys = query.shape[2], key.shape[2]
    seen = rows.stop + keys - length if causal else keys
    logits = _products(query[:, :, rows], key[:, :, :seen], scaling)
    if mask is not None and mask.ndim == 4:
        logits = _hide(logits, mask[:, :, rows if mask.shape[2] > 1 else slice(None), :seen])
    elif mask is not None:
        logits = _hide(logits, mask[:, None, None, -keys:][..., :seen].bool())
    if causal:
        count = rows.stop - rows.start
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
        logits[..., seen - count :].masked_fill_(later, torch.finfo(torch.float32).min)
    return logits


def _products(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Of all rows of `query` with all keys, scaled, in float32; the heads that share keys stand one behind the other,
    so that no key is repeated in memory."""
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    logits = torch.matmul(query.reshape(batch, groups, -1, width), key.transpose(-1, -2)).float().mul_(scaling)
    return logits.view(batch, heads, rows, key.shape[2])


def _hide(logits: Tensor, mask: Tensor) -> Tensor:
    """`logits`, of which nobody else knows, with the mask put on: False is not seen, or what is to be added."""
    if mask.dtype == torch.bool:
        return logits.masked_fill_(~mask, torch.finfo(torch.float32).min)
    return logits.add_(mask.float())


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
