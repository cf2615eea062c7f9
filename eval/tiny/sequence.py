"""Where things stand in a packed sequence: a prompt up to its last visual token, then questions that do not see each
other. Every slot sees the prefix and itself only, and its positions restart right after the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def offsets(lengths: Sequence[int]) -> Tensor:
    """Place of every text token within its slot, (sum of lengths,) int64."""
    return torch.cat([torch.arange(length) for length in lengths])


def visible(prefix: int, lengths: Sequence[int]) -> Tensor:
    """Which key (column) each query (row) may see, (prefix + sum of lengths) squared, bool."""
    slot = torch.cat([torch.zeros(prefix), *(torch.full((n,), i) for i, n in enumerate(lengths, start=1))])
    causal = torch.ones(len(slot), len(slot), dtype=torch.bool).tril()
    return causal & ((slot[None, :] == 0) | (slot[None, :] == slot[:, None]))


@lru_cache(maxsize=32)
def additive_mask(prefix: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`visible` as a mask to add to attention scores, (1, 1, L, L) of 0 and -inf."""
    seen = visible(prefix, lengths)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None].to(device)
