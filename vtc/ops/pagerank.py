"""PageRank on the attention of one layer: how much mass reaches a token when every token passes its own on."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.blocks import CACHED

BLOCK = 2**25
"""Numbers of an attention block held at once (128 MiB in float32)."""
STORE = 2**26
"""Numbers of an attention matrix that is kept between the iterations instead of being computed again (256 MiB)."""


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
    block: int = BLOCK,
    store: int = STORE,
) -> Tensor:
    """[B, Q] root mean square over heads of what `attention_mass` gives, from an equal share for every voter.

    voters: [B, Q] bool, the rows that have a share, all of them by default. All else as there.
    """
    voting = query.new_ones(query.shape[0], query.shape[2], dtype=torch.float32) if voters is None else voters.float()
    share = voting / voting.sum(1, keepdim=True).clamp(min=1)
    mass = attention_mass(
        query, key, scaling, share, tau=tau, iterations=iterations, damping=damping, mask=mask, causal=causal,
        block=block, store=store,
    )  # fmt: skip
    return mass.square().mean(1).sqrt()


def attention_mass(
    query: Tensor,
    key: Tensor,
    scaling: float,
    share: Tensor,
    *,
    tau: float = 1.0,
    iterations: int = 5,
    damping: float = 0.0,
    mask: Tensor | None = None,
    causal: bool = False,
    block: int = BLOCK,
    store: int = STORE,
) -> Tensor:
    """p of every head after `iterations` of ``p <- (1 - damping) p softmax(S / tau) + damping p0``.

    query: [B, Hq, Q, D], key: [B, Hk, K, D], both after rotary embedding; Hq is a multiple of Hk (grouped queries).
    Queries are the last Q of the K keys; mass that reaches the keys before them is lost. mask: [B, 1|Hq, Q, K] bool or
    additive, or [B, K] bool (False receives nothing). causal: query i sees keys up to i + K - Q. share: [B, Q], p0;
    rows that see no key pass nothing on. Returns [B, Hq, Q], float32. As many heads at a time as the device works on
    best; streams over the queries of a head, never [Q, K] at once unless Q * K is below `store`.
    """
    batch, heads, length, _ = query.shape
    keys, numbers = key.shape[2], length * key.shape[2]
    mask = mask.expand(-1, heads, -1, -1) if mask is not None and mask.ndim == 4 else mask
    some = max(1, (CACHED if query.device.type == "cpu" else store) // numbers)
    found = []
    for rows in torch.split(torch.arange(batch * heads, device=query.device), some):
        item, head = rows // heads, rows % heads
        seen = None if mask is None else mask[item, -keys:] if mask.ndim == 2 else mask[item, head]
        q, k = query[item, head].float() * (scaling / tau), key[item, head // (heads // key.shape[1])].float()
        keep = len(rows) * numbers <= store
        found.append(_mass(q, k, share[item].float(), seen, tau, iterations, damping, causal, block, keep=keep))
    return torch.cat(found).view(batch, heads, length)


def _mass(
    query: Tensor,
    key: Tensor,
    begin: Tensor,
    mask: Tensor | None,
    tau: float,
    iterations: int,
    damping: float,
    causal: bool,
    block: int,
    *,
    keep: bool,
) -> Tensor:
    """[G, Q] the same for heads side by side; query [G, Q, D], key [G, K, D], begin [G, Q], mask [G, Q, K] or [G, K].

    keep: hold the attention between the iterations instead of computing it again.
    """
    heads, length, keys = *query.shape[:2], key.shape[1]
    before, seen = keys - length, key.transpose(1, 2)
    rows = max(1, min(length, block // max(1, heads * keys)))
    stored: list[Tensor] = []
    norms: list[Tensor] = []
    mass = begin
    for step in range(iterations):
        arrived = torch.zeros_like(begin)
        for number, first in enumerate(range(0, length, rows)):
            last = min(first + rows, length)
            end = last + before if causal else keys
            if step == 0 or not keep:
                logits = _masked(query[:, first:last] @ seen[..., :end], mask, tau, causal, first, before)
                if step == 0:
                    norms.append(logits.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min))
                weights = logits.sub_(norms[number]).exp_()
                if keep:
                    stored.append(weights)
            else:
                weights = stored[number]
            passed = torch.bmm(mass[:, None, first:last], weights)[:, 0, before:]
            arrived[:, : passed.shape[1]] += passed
        mass = (1 - damping) * arrived + damping * begin
    return mass


def _masked(logits: Tensor, mask: Tensor | None, tau: float, causal: bool, first: int, before: int) -> Tensor:
    """Sharpened logits [G, rows, end] of the queries from `first` on, -inf where a key is not seen."""
    rows, end = logits.shape[1:]
    if mask is not None:
        part = mask[:, None, :end] if mask.ndim == 2 else mask[:, first : first + rows, :end]
        additive = part.dtype != torch.bool and mask.ndim == 3
        logits = logits + part.float() / tau if additive else logits.masked_fill(~part.bool(), -torch.inf)
    if causal:
        places = torch.arange(end, device=logits.device)
        own = torch.arange(first, first + rows, device=logits.device)[:, None] + before
        logits = logits.masked_fill(places > own, -torch.inf)
    return logits
