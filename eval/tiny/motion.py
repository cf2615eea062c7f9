"""What the language model is asked in training about clips: whether and where the actor of every visual token moves.

The answers to "Which way does it move?" give next to no gradient before the model compares frames, which nothing else
asks of it; here every visual token is told what it can find out by looking back at the frame before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vtc.eval.tiny.clips import STEPS
from vtc.eval.tiny.family import View
from vtc.eval.tiny.sample import Facts
from vtc.eval.tiny.targets import coverage

WAYS = ("nothing", "still", *STEPS)
_MIN_OVERLAP = 0.06  # share of a token's part of the frame that an actor must cover


def _way(facts: Facts, name: str, pictures: Sequence[int]) -> int | None:
    """Number among `WAYS` of what the actor of that form does in these frames, None for a thing that is no actor."""
    actor = next((actor for actor in facts.actors if actor.name == name), None)
    if actor is None:
        return None
    start, end = actor.moves
    moves = actor.direction and any(start < t <= end for t in pictures)
    return WAYS.index(actor.direction if moves else "still")


def motion_targets(facts: Facts, view: View, rows: int, columns: int) -> NDArray[np.uint8]:
    """Numbers among `WAYS` for the visual tokens of a view, (rows * columns); the largest overlap wins a token."""
    targets = np.zeros((rows, columns), dtype=np.uint8)
    best = np.full((rows, columns), _MIN_OVERLAP)
    for item in (item for number in view.pictures for item in facts.pictures[number]):
        way = _way(facts, item.name, view.pictures)
        if way is not None:
            overlap, _ = coverage(item, view.box, rows, columns)
            targets[overlap > best] = way
            best = np.maximum(best, overlap)
    return targets.reshape(-1)


class MotionHead(nn.Module):
    """A linear read-out of the visual tokens behind the middle of the language model that exists in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.way = nn.Linear(width, len(WAYS))

    def forward(self, states: Tensor) -> Tensor:
        """Logits (B, n, WAYS) of visual tokens (B, n, width)."""
        logits: Tensor = self.way(states)
        return logits.float()

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Half mean over all tokens, half over those that show an actor; targets (B, n) from `motion_targets`."""
        target = targets.long()
        loss = F.cross_entropy(self(states).flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        filled = target > 0
        return 0.5 * loss.mean() + 0.5 * (loss * filled).sum() / filled.sum().clamp_min(1)

    @torch.no_grad()
    def hits(self, states: Tensor, targets: Tensor) -> tuple[int, int]:
        """Right and all tokens that show an actor that moves."""
        moving = targets > 1
        return int((self(states).argmax(-1).eq(targets) & moving).sum()), int(moving.sum())
