"""Counter-based random numbers on the device: a function of (item, token, seed), never of the batch around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.ops.host import put

_SAMPLES = 4096
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values bijectively (the finaliser of SplitMix64; products wrap around)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        logical = (x >> shift) & ((1 << (64 - shift)) - 1)
        x = (x ^ logical) * factor
    return x


def fingerprint(values: Tensor) -> Tensor:
    """A key of each entry's bits: [I, ...] of any dtype -> [I] int64. Equal bits give equal keys, on every device."""
    flat = values.detach().flatten(1)
    flat = flat[:, :: max(1, flat.shape[1] // _SAMPLES)].contiguous()
    bits = flat.view(_BITS[flat.element_size()]).long()
    place = _mix(torch.arange(bits.shape[1], device=bits.device))
    return _mix((_mix(bits + place)).sum(1))


def joint_fingerprint(keys: Tensor, counts: Sequence[int]) -> Tensor:
    """One key for every run of `counts` neighbours: [C] int64 -> [I] int64; depends on their order."""
    sizes = put(counts, keys.device)
    item = torch.arange(len(counts), device=keys.device).repeat_interleave(sizes, output_size=len(keys))
    place = torch.arange(len(keys), device=keys.device) - (sizes.cumsum(0) - sizes)[item]
    return _mix(torch.zeros_like(sizes).index_add(0, item, _mix(keys + _mix(place))))


def uniform(key: Tensor, token: Tensor, seed: int) -> Tensor:
    """Random numbers in [0, 1) for each token of each item.

    key: [I] int64 item keys, token: [I, N] token numbers inside the item. Returns float32 [I, N].
    """
    start = _mix(key + _mix(torch.full_like(key, seed)))
    return ((_mix(start[:, None] + _mix(token.long())) >> 40) & 0xFFFFFF).float() / (1 << 24)
