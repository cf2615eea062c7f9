"""Random pruning: the baseline every method has to beat."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar

from torch import Tensor

from vtc.method.base import Scope, ScoringCompressor, StageView
from vtc.method.registry import register
from vtc.ops.hashing import uniform


@register
class Random(ScoringCompressor):
    """Keep a random subset of each item's tokens, in their original order.

    Acts before the LLM, needs nothing. The draw depends on `seed` and on the item's pixels alone, so it is the same in
    every batch and at every place of a prompt, and two images get different subsets. At a given seed a smaller budget
    keeps a subset of what a larger one keeps (of images with one crop; over several crops the shares are rounded).
    Every crop, tile or frame keeps the same share (`scope`).

    >>> import vtc
    >>> vtc.create("random", seed=1)
    Random(scope='crop', seed=1)
    """

    seed: int = 0
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "random"

    def score(self, view: StageView) -> Tensor:
        return uniform(view.fingerprint, view.items.token, self.seed)
