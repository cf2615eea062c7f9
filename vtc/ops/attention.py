"""Rows of the attention matrix from queries and keys, without ever holding the whole matrix."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 256


def attention_rows(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    scaling: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    chunk: int = CHUNK,
) -> Tensor:
    """Softmax attention of the chosen query rows, mean over heads, in float32.

    query: [B, Hq, Q, D], key: [B, Hk, K, D], both after rotary embedding; Hq is a multiple of Hk (grouped queries).
    rows: [B, R] query indices. mask: [B, 1|Hq, Q, K] bool or additive, or [B, K] bool (False is never attended).
    causal: query i sees keys up to i + K - Q. Returns [B, R, K]; each row sums to one.
    """
    parts = [_rows(query, key, part, scaling, mask, causal) for part in torch.split(rows, chunk, dim=1)]
    return torch.cat(parts, dim=1)


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
            place = torch.tensor(same, device=query.device)[:, None] + steps
            q, k = query[0][:, place].transpose(0, 1), key[0][:, place].transpose(0, 1)
            total[0, place] = attention_received(q, k, scaling, chunk=max(1, chunk // len(same)))
    return total


def _rows(query: Tensor, key: Tensor, rows: Tensor, scaling: float, mask: Tensor | None, causal: bool) -> Tensor:
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    index = rows[:, None, :, None]
    q = query.gather(2, index.expand(batch, heads, -1, width)).view(batch, groups, heads // groups, -1, width)
    logits = torch.matmul(q, key.unsqueeze(2).transpose(-1, -2)).float() * scaling
    logits = logits.flatten(1, 2)  # [B, Hq, R, K]
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
    return logits.softmax(-1).mean(1)
