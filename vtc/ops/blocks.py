"""Rows in blocks of tokens, as many at a time as the device works on best."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.ops.select import take_rows

CACHED, HELD = 2**18, 2**25
"""Numbers of a block on a CPU, where what a step makes is to stay in the cache, and elsewhere, where launches cost."""
LEAST = 16
"""No block has fewer tokens of each item."""


def at_once(numbers: int, device: torch.device) -> int:
    """How many rows of so many numbers are worked on together.

    >>> at_once(2**10, torch.device("cpu")), at_once(2**20, torch.device("cpu"))
    (256, 16)
    """
    return max(LEAST, (CACHED if device.type == "cpu" else HELD) // max(1, numbers))


def blocks(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tokens of `rows` [I, N, D] block by block, with the same ones of `others` [I, N, ...].

    >>> [some.shape[1] for some, _ in blocks(torch.zeros(1, 40, 2**16), torch.arange(40)[None])]
    [16, 16, 8]
    """
    size = at_once(rows.shape[0] * rows.shape[2], rows.device)
    return zip(*(torch.split(each, size, 1) for each in (rows, *others)), strict=True)


def lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths of rows [I, N, D], float32 [I, N]."""
    return torch.cat([some.float().norm(dim=2) for (some,) in blocks(rows)], 1)


def distances(rows: Tensor, others: Tensor, place: Tensor | None = None) -> Tensor:
    """Euclidean distance of each row [I, N, D] to the one at its `place` [I, N] of `others` [I, M, D]; float32 [I, N].

    place: None where each row's is its own.

    >>> distances(torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 2, 2), torch.tensor([[1]])).tolist()
    [[5.0]]
    """
    if place is None:
        pairs = blocks(rows, others)
    else:
        pairs = ((some, take_rows(others, spots)) for some, spots in blocks(rows, place))
    return torch.cat([(some.float() - other.float()).norm(dim=2) for some, other in pairs], 1)
