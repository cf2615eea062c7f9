"""Cosines between tokens without a scaled copy of them, in float32: with a direction, with each other, in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtc.ops.blocks import blocks

STORE = 2**26
"""Similarities held at once (256 MiB)."""
PAYS = 16
"""A matrix product is so many times as fast as the products with single vectors, which wait for memory."""


def total(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the tokens: [I, N, D], [I, N] or a mask -> float32 [I, D]. Streams over the tokens."""
    result = features.new_zeros(len(features), 1, features.shape[2], dtype=torch.float32)
    for some, weight in blocks(features.detach(), weights):
        result.baddbmm_(weight[:, None].float(), some.float())
    return result[:, 0]


def alignment(features: Tensor, direction: Tensor) -> Tensor:
    """Product of each token, scaled to unit length, with its item's direction [I, D]; float32 [I, N].

    The cosine where the direction has unit length; the mean of several cosines where it is the mean of several units.
    """
    return alignments(features, direction[:, None])[:, 0]


def alignments(features: Tensor, directions: Tensor) -> Tensor:
    """As `alignment` for several directions [I, P, D] of an item; float32 [I, P, N]. Streams over the tokens."""
    found = []
    for (some,) in blocks(features.detach()):
        some = some.float()
        # A row times a matrix: on CPUs several times as fast as the matrix times a column.
        product = torch.bmm(directions, some.transpose(1, 2))
        found.append(product.div_(some.norm(dim=2).clamp_(min=1e-12)[:, None]))
    return torch.cat(found, 2)


def cosine_to_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Cosine between each token and the mean of its item's tokens (not of unit length); [I, N, D] -> float32 [I, N]."""
    return alignment(features, torch.nn.functional.normalize(total(features, mask), dim=1))


class Cosines:
    """Cosines between tokens [I, N, D] without a scaled copy of them; zero with vectors of no or no finite length.

    steps: how many rows will be asked for, which decides whether all similarities are computed and held.
    """

    def __init__(self, features: Tensor, steps: int) -> None:
        self.rows = features.detach().float()
        self.item = torch.arange(len(features), device=features.device)
        length = self.rows.norm(dim=2)
        # A NaN would win every comparison, be chosen again and again, and leave an item short of tokens.
        self.scale = torch.where((length > 1e-12) & (length < torch.inf), 1 / length, 0.0)
        items, places = self.scale.shape
        self.all: Tensor | None = None
        if items * places * places <= STORE and places <= PAYS * steps:
            self.all = self.rows.new_empty(items, places, places)
            # A quarter at a time saves a CPU products, a whole saves a GPU launches.
            for some, others, cosine in self.blocks(max(1, places if self.rows.is_cuda else -(-places // 4))):
                self.all[:, some, others] = cosine
                if some != others:
                    self.all[:, others, some] = cosine.transpose(1, 2)

    def blocks(self, size: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, cosines [I, n, m]) of blocks of the matrix that with their transposes cover it."""
        ranges = [slice(at, at + size) for at in range(0, self.scale.shape[1], size)]
        for number, some in enumerate(ranges):
            for others in ranges[number:]:
                cosine = torch.bmm(self.rows[:, some], self.rows[:, others].transpose(1, 2))
                cosine = cosine.mul_(self.scale[:, some, None]).mul_(self.scale[:, None, others])
                yield some, others, cosine.nan_to_num_(0.0)

    def direction(self, token: Tensor) -> Tensor:
        """[I, D] tokens scaled to unit length."""
        return (self.rows[self.item, token] * self.scale[self.item, token, None]).nan_to_num(0.0)

    def to(self, token: Tensor) -> Tensor:
        """[I, N] cosine of every token to one of its item's, [I]."""
        if self.all is not None:
            return self.all[self.item, token]
        return (products(self.rows, self.direction(token)) * self.scale).nan_to_num_(0.0)


def products(rows: Tensor, direction: Tensor) -> Tensor:
    """[I, N, D], [I, D] -> [I, N]. A row times a matrix: on CPUs eight times as fast as the matrix times a column."""
    return torch.bmm(direction[:, None, :], rows.transpose(1, 2))[:, 0]
