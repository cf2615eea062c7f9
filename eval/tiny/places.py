"""What the language model is asked in training about clips besides the questions: where things are, and what answers
follow from.

The answers to "Which way does it move?" give next to no gradient before the model compares frames, which nothing else
asks of it. Here it has to say, linearly, what there is to compare: behind the first layers every visual token where the
actor is that it shows, and behind most of them the last token of such a question its four clues, in bins of 4 px or in
frames.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vtc.eval.tiny.clips import BINS, bins
from vtc.eval.tiny.family import View
from vtc.eval.tiny.sample import Facts
from vtc.eval.tiny.targets import coverage

NOTHING = 255
_MIN_OVERLAP = 0.06  # share of a token's part of the frame that an actor must cover


def place_targets(facts: Facts, view: View, rows: int, columns: int) -> NDArray[np.uint8]:
    """Bins (x, y) of the middle of what each visual token of a view shows, (rows * columns, 2), or `NOTHING`.

    The actor with the largest overlap wins a token.
    """
    actors = {actor.name for actor in facts.actors}
    targets = np.full((rows, columns, 2), NOTHING, dtype=np.uint8)
    best = np.full((rows, columns), _MIN_OVERLAP)
    for item in (item for number in view.pictures for item in facts.pictures[number]):
        if item.name in actors:
            overlap, _ = coverage(item, view.box, rows, columns)
            left, top, right, bottom = item.box
            targets[overlap > best] = bins([(left + right) / 2, (top + bottom) / 2])
            best = np.maximum(best, overlap)
    return targets.reshape(-1, 2)


class PlaceHeads(nn.Module):
    """Linear read-outs of the language model that exist in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Linear(width, 2 * BINS)
        self.clues = nn.Linear(width, 4 * BINS)

    def forward(self, states: tuple[Tensor, Tensor], places: Tensor, clues: Tensor) -> dict[str, Tensor]:
        """Losses "spot" of visual tokens and "clues" of text, (B, n, width) each.

        Targets are (B, n, 2) and (B, n, 4); where they are `NOTHING` nothing is asked.
        """
        read = {"spot": (self.place(states[0]), places), "clues": (self.clues(states[1]), clues)}
        return {name: _loss(*each) for name, each in read.items()}

    @torch.no_grad()
    def hits(self, states: tuple[Tensor, Tensor], places: Tensor, clues: Tensor) -> list[tuple[str, int, int]]:
        """Names, right and all answers, where a neighbour counts as right."""
        read = {"token place": (self.place(states[0]), places), "question clues": (self.clues(states[1]), clues)}
        return [(name, *_near(*each)) for name, each in read.items()]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    asked = targets[..., 0] != NOTHING
    chosen = logits[asked].float().reshape(-1, BINS)
    return F.cross_entropy(chosen, targets[asked].long().flatten()) if len(chosen) else logits.sum() * 0.0


def _near(logits: Tensor, targets: Tensor) -> tuple[int, int]:
    asked = targets[..., 0] != NOTHING
    guess = logits[asked].reshape(-1, BINS).argmax(-1)
    near = (guess - targets[asked].long().flatten()).abs() <= 1
    return int(near.sum()), near.numel()
