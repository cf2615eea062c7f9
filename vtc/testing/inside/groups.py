"""Tokens that merge one by one, for the plain loops of methods that join tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.testing.encoders import BLOCKS, Act, Seen


@dataclass
class Group:
    """A token: how many patches are in it, the one whose place it has, its row and what it is compared by."""

    size: int
    place: int
    row: Tensor
    metric: Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors, in double precision."""
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def alike(a: Group, b: Group) -> float:
    """Cosine of what two tokens are compared by."""
    return cosine(a.metric, b.metric)


def nearest(cosines: Mapping[int, float]) -> int:
    """The first of those that are most alike; what is closer than 1e-5 counts as equal."""
    return next(n for n, each in cosines.items() if each >= max(cosines.values()) - 1e-5)


def joined(target: Group, sources: Sequence[Group], weighted: bool) -> Group:
    """The mean at the place of `target`. weighted: each counts as often as it has patches."""
    parts = [*sources, target]
    shares = torch.tensor([float(part.size) if weighted else 1.0 for part in parts])
    shares = shares / shares.sum()
    row, metric = (sum(share * vector for share, vector in zip(shares, vectors, strict=True))
                   for vectors in ([part.row for part in parts], [part.metric for part in parts]))  # fmt: skip
    return Group(sum(part.size for part in parts), target.place, row, metric)


def merging(
    method: Any, lead: int, plans: Sequence[Sequence[int]], step: Callable[[list[Group], int, int], list[Group]]
) -> Act:
    """Passes behind every block, by what its keys or rows are; in the order of the picture at the end.

    plans: tokens that merge away in each pass of every block. step: (tokens, how many merge away, block) -> those left.
    """
    tokens: list[Group] = []

    def act(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        if seen is None:
            tokens[:] = [Group(1, place, row, row) for place, row in enumerate(rows[lead:])]
            return rows, None
        metric = (rows if method.metric == "features" else seen.key.mean(1)).detach()
        now = zip(tokens, rows[lead:], metric[lead:], strict=True)
        tokens[:] = [Group(token.size, token.place, row, each) for token, row, each in now]
        for r in filter(None, plans[layer - 1]):
            tokens[:] = step(tokens, r, layer - 1)
        if layer == BLOCKS:
            tokens.sort(key=lambda token: token.place)
        sizes = torch.tensor([1.0] * lead + [float(token.size) for token in tokens])
        rows = torch.cat([rows[:lead], torch.stack([token.row for token in tokens])])
        return rows, sizes if method.proportional else None

    return act
