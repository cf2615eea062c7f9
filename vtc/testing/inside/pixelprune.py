"""PixelPrune as a walk over the patches of one picture."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.methods.pixelprune import PixelPrune
from vtc.testing.encoders import PATCH, SIDE, Act, Seen
from vtc.testing.inside import InsideCase


def walk(cells: Tensor, tau: float, metric: str) -> tuple[list[int], list[float]]:
    """Which of the patches [R, C, pixels] stay, and how far each is from its prediction."""
    height, width = cells.shape[:2]
    seen: dict[tuple[int, int], Tensor] = {}
    stays, rest = [], []

    def apart(one: Tensor, other: Tensor) -> float:
        gap = (one - other).abs()
        return float({"max": gap.max(), "mae": gap.mean(), "rmse": gap.square().mean().sqrt()}[metric])

    for r in range(height):
        for c in range(width):
            own, guess = cells[r, c], None
            if r and c:
                a, b, corner = seen[r, c - 1], seen[r - 1, c], seen[r - 1, c - 1]
                guess = b if apart(corner, a) <= tau and apart(corner, b) > tau else a
            elif r or c:
                guess = seen[r, c - 1] if c else seen[r - 1, c]
            distance = float("inf") if guess is None else apart(own, guess)
            rest.append(distance)
            if guess is None or distance > tau:
                stays.append(width * r + c)
                seen[r, c] = own
            else:
                seen[r, c] = guess
    return stays, rest


def cut(image: Tensor) -> Tensor:
    """[4, 4, pixels] the squares of 8 x 8 of a picture of 32 x 32."""
    starts = range(0, SIDE * PATCH, PATCH)
    rows = [[image[:, r : r + PATCH, c : c + PATCH].flatten() for c in starts] for r in starts]
    return torch.stack([torch.stack(row) for row in rows])


def left(image: Tensor, method: PixelPrune, keep: int | None) -> list[int]:
    """The patches that stay: those that are not predicted, or the `keep` that are predicted worst."""
    stays, rest = walk(cut(image), method.tau or 0.0, method.metric)
    if keep is None:
        return stays
    return sorted(sorted(range(len(rest)), key=lambda n: (-rest[n], n))[:keep])


def plain(method: PixelPrune, image: Tensor, lead: int, keep: int | None) -> Act:
    """Patches leave in front of the first block."""
    rows_left = [*range(lead), *(lead + n for n in left(image, method, keep))]

    def act(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        return rows if layer else rows[rows_left], None

    return act


CASE = InsideCase(plain, ({}, {"tau": 0.15}, {"tau": None, "metric": "mae"}))
