"""The dual-attention filter: what the text as a whole and its single tokens look at, and the key set that stays.

Letters: I items, N tokens, B rows of a batch, K keys, R query rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtc.method.groups import Parts
from vtc.ops.attention import CHUNK, attention_rows
from vtc.ops.checks import numbers
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import settle

LIMIT = 2**24
"""Attention weights held at once: 64 MiB, so that the text of a long video's question fits beside the model."""


def attention_sum_and_max(
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
    """Sum and maximum, over the chosen query rows, of the head-mean softmax attention to each key; [2, B, K] float32.

    rows: [B, R] query indices, real: [B, R] bool, which of them count (none: zeros). Other arguments as in
    `attention_rows`. Streams over the rows: memory is [B, H, chunk, K], by default at most `LIMIT` numbers.
    """
    chunk = chunk or max(1, min(CHUNK, LIMIT // (query.shape[0] * query.shape[1] * max(1, key.shape[2]))))
    total = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    peak = total
    for start in range(0, rows.shape[1], chunk):
        part = attention_rows(query, key, rows[:, start : start + chunk], scaling, mask=mask, causal=causal)
        part = part * real[:, start : start + chunk, None]
        total, peak = total + part.sum(1), torch.maximum(peak, part.amax(1))
    return torch.stack([total, peak])


def key_tokens(score: Tensor, tiles: Parts, rate: float) -> Tensor:
    """Mark ceil(rate * size) tokens of every tile, the highest scores; equal scores go to the lower index.

    score: [I, N]. Returns bool [I, N].

    >>> every = torch.ones(1, 5, dtype=torch.bool)
    >>> key_tokens(torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.5]]), Parts(every, None, every), 0.4).int().tolist()
    [[0, 1, 0, 0, 1]]
    """
    count = (tiles.mask.sum(1).double() * rate).ceil().long()
    most = math.ceil(tiles.mask.shape[1] * rate)
    return tiles.give(tiles.best(tiles.take(score), count, most))


def dual_filter(total: Tensor, peak: Tensor, gamma: float, alpha: float, mask: Tensor) -> Tensor:
    """Mark the tokens that the text looks at: bool [I, N].

    total: [I, N] attention summed over the text rows, peak: its maximum over them. A token falls only if it draws less
    than the share `gamma` of what all tokens of its item draw, and no text token pays it `alpha` or more.
    """
    total = total.float().masked_fill(~mask, 0.0)
    total, peak = numbers(total, mask), numbers(peak, mask)
    return mask & ((total >= gamma * total.sum(1, keepdim=True)) | (peak.float() >= alpha))


def utilities(total: Tensor, peak: Tensor, gamma: float, alpha: float, mask: Tensor) -> Tensor:
    """The factor by which both thresholds of `dual_filter` could grow before a token falls: [I, N] float32.

    ``u_j = max(g_j / (gamma * sum g), m_j / alpha)``; the filter keeps exactly u_j >= 1. Zero where nothing was paid.
    """
    total = total.float().masked_fill(~mask, 0.0)
    whole = total.sum(1, keepdim=True)
    share = torch.where(whole > 0, total / (gamma * whole), 0.0)
    return torch.maximum(share, peak.float() / alpha).masked_fill(~mask, 0.0)


def keep_with_keys(utility: Tensor, key: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    """Mark `keep` [I] entries of each row: the key set first, then the largest utilities; bool [I, N].

    utility: [I, N]; ties go to the lower index. key, mask: [I, N] bool. A key set larger than `keep` is ranked by
    utility itself.

    >>> keep_with_keys(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[False, False, True]]), torch.tensor([2]),
    ...                torch.ones(1, 3, dtype=torch.bool)).tolist()
    [[True, False, True]]
    """
    tier = torch.where(mask, torch.where(key, 0, 1), 2)
    return (inverse(order_by(tier, best=settle(utility, mask))) < keep[:, None]) & mask
