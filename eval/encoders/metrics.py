"""Ranks among similarities, and what they and the time of batches come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtc.eval.scoring import Scored
from vtc.eval.statistics import Outcomes
from vtc.eval.store import Record

CHUNK = 512
"""Rows of similarities at once."""


def rank_of(near: Tensor, target: Tensor) -> Tensor:
    """How many columns of each row stand in front of its target, earlier ones where they tie; near [B, C], [B].

    >>> rank_of(torch.tensor([[0.1, 0.3, 0.3], [0.9, 0.2, 0.1]]), torch.tensor([2, 0])).tolist()
    [1, 0]
    """
    target = target.to(near.device)[:, None]
    right = near.gather(1, target)
    earlier = torch.arange(near.shape[1], device=near.device) < target
    return ((near > right) | ((near == right) & earlier)).sum(1)


def within(pictures: Tensor, texts: Sequence[Tensor]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks of the best own text of each picture [N], and of each text's picture [M].

    pictures: [N, D]; texts: N of [captions, D], all of length 1.
    """
    every = torch.cat(list(texts))
    owner = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(each) for each in texts]))
    to_text = []
    for start in range(0, len(pictures), CHUNK):
        near = pictures[start : start + CHUNK] @ every.T
        own = owner[None] == torch.arange(start, start + len(near))[:, None]
        best = torch.where(own, near, -torch.inf).argmax(1)
        to_text.append(rank_of(near, best))
    to_image = [
        rank_of(every[start : start + CHUNK] @ pictures.T, owner[start : start + CHUNK])
        for start in range(0, len(every), CHUNK)
    ]
    return torch.cat(to_text).numpy(), torch.cat(to_image).numpy()


def mean_of(values: NDArray[Any]) -> Scored:
    """A metric that is the mean of one value per document."""
    scores = values.astype(np.float64)
    return Scored(float(scores.mean()), tuple(range(len(scores))), Outcomes(scores.tolist(), _mean, scores))


def _mean(values: list[Any]) -> float:
    return float(np.mean(values))


def speed(rows: Sequence[Record]) -> Scored:
    """Images per second: one divided by the median over batches of their seconds per image.

    Batches are its documents, named by the first of them: those of another cell saw the same pictures right before.
    """
    batches: dict[int, list[float]] = {}
    for row in rows:
        batches.setdefault(row["batch"], []).append(row["seconds"])
    each = {first: sum(parts) / len(parts) for first, parts in sorted(batches.items())}
    return Scored(_rate(list(each.values())), tuple(each), Outcomes(list(each.values()), _rate, None))


def _rate(seconds: list[Any]) -> float:
    return 1.0 / float(np.median(seconds))
