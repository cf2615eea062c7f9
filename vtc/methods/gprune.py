"""G-Prune: importance that spreads over a graph of alike tokens (arXiv:2501.02268)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Scope, ScoringCompressor, StageView
from vtc.method.groups import Parts
from vtc.method.registry import register
from vtc.ops.checks import numbers
from vtc.ops.select import TIE, settle

BLOCK = 2**24
"""Edges held at once (64 MiB)."""
CUT = -5000.0
"""The logit of two tokens that are not alike."""


@register
class GPrune(ScoringCompressor):
    """Keep the tokens that collect most importance in a walk over the graph of alike tokens.

    Acts before the LLM on the projected tokens; training-free, text-agnostic, reads no attention. Tokens of cosine
    ``c_ij >= threshold`` are joined; of the walk ``A_ij = softmax_j(c_ij / tau)`` over the joined ones, `steps` steps
    begin with the lengths of the tokens, and what arrives is divided by the number of a token's neighbours, itself
    included: ``s_j = (|x| A^steps)_j / deg_j`` (arXiv:2501.02268, section 3). Ties go to the lower index, kept tokens
    stay in raster order. The matrix of many tokens is not held: a step costs N^2 D multiplications there.

    threshold, tau, steps: as released. scope: "crop" walks inside every crop, tile or frame, "item" over all of them.

    Departures from the paper and its code: newline tokens stay and are no nodes; crops keep the same share of their
    tokens; cosines are computed in float32.

    >>> import vtc
    >>> vtc.create("gprune", steps=3)
    GPrune(scope='crop', threshold=0.5, tau=0.03, steps=3)
    """

    threshold: float = 0.5
    tau: float = 0.03
    steps: int = 5
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "gprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1 or self.tau <= 0 or self.steps < 1:
            raise VTCError(
                f"threshold={self.threshold}, tau={self.tau}, steps={self.steps} make no walk; use a cosine, a "
                "positive temperature and at least one step, as released 0.5, 0.03 and 5"
            )

    @torch.no_grad()
    def score(self, view: StageView) -> Tensor:
        parts = Parts.of(view, self.scope)
        arrived = self.collected(parts.take(view.tokens), parts.mask)
        return parts.give(settle(arrived, parts.mask, 10 * TIE))  # a small tau enlarges what rounding leaves

    def collected(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[R, W] what arrives at each of the tokens [R, W, D] per neighbour; mask: [R, W]."""
        tokens = numbers(tokens, mask).float()
        length = tokens.norm(dim=2)
        unit = tokens / length[..., None].clamp(min=1e-12)
        mass, degree = length.masked_fill(~mask, 0), torch.zeros_like(length)
        held = list(self._walk(unit, mask)) if mask.numel() * mask.shape[1] <= BLOCK else None
        for step in range(self.steps):
            arrived = torch.zeros_like(mass)
            for some, walk in held or self._walk(unit, mask):
                arrived += torch.bmm(mass[:, None, some], walk)[:, 0]
                if not step:
                    degree[:, some] = (walk > 0).sum(2).float()
            mass = arrived
        return torch.div(mass, degree.clamp(min=1))

    def _walk(self, unit: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the tokens, and [R, w, W] where a step leads from these."""
        size = max(1, BLOCK // max(1, mask.numel()))
        for first in range(0, mask.shape[1], size):
            some = slice(first, first + size)
            like = torch.bmm(unit[:, some], unit.transpose(1, 2))
            logits = torch.where(like >= self.threshold, like / self.tau, CUT)
            yield some, logits.masked_fill(~mask[:, None], -torch.inf).softmax(2).nan_to_num(0.0)
