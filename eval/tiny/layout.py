"""Where things stand in a packed training sequence: one picture followed by many questions that do not see each other.

A sequence is `<s> USER: <image> x 144`, then one slot of fixed length per question. Every slot sees the prefix and
itself only, and its positions restart right after the prefix, so a packed sequence is the same calculation as one
prompt per question, with a single pass over the picture.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vtc.eval.tiny.scenes import GRID

VISUAL_TOKENS = GRID * GRID
PREFIX = 2 + VISUAL_TOKENS  # <s> USER: and the visual tokens
SLOTS: tuple[tuple[str, int], ...] = (  # family, tokens: question, ASSISTANT:, answer
    ("existence", 8),
    ("colour", 8),
    ("shape", 9),
    ("counting", 9),
    ("counting", 9),
    ("relation", 13),
    ("relation", 13),
    ("referring", 10),
    ("referring", 10),
    ("location", 8),
    ("digits", 8),
    ("words", 8),
)
TEXT_TOKENS = sum(length for _, length in SLOTS)
LENGTH = PREFIX + TEXT_TOKENS


@lru_cache(maxsize=1)
def positions() -> Tensor:
    """Position ids of the packed sequence, (LENGTH,) int64."""
    slots = [torch.arange(PREFIX, PREFIX + length) for _, length in SLOTS]
    return torch.cat([torch.arange(PREFIX), *slots])


@lru_cache(maxsize=1)
def visible() -> Tensor:
    """Which key (column) each query (row) may see, (LENGTH, LENGTH) bool."""
    slot = torch.zeros(LENGTH, dtype=torch.long)
    start = PREFIX
    for index, (_, length) in enumerate(SLOTS, start=1):
        slot[start : start + length] = index
        start += length
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    return causal & ((slot[None, :] == 0) | (slot[None, :] == slot[:, None]))


def additive_mask(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`visible()` as a mask to add to attention scores, (1, 1, LENGTH, LENGTH) of 0 and -inf."""
    mask = torch.zeros(LENGTH, LENGTH, dtype=dtype).masked_fill(~visible(), float("-inf"))
    return mask[None, None].to(device)
