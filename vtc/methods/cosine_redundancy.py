"""Cosine redundancy: drop what resembles all others most, in linear time (as vLLM prunes images)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vtc.method.base import ScoringCompressor, StageView
from vtc.method.groups import Parts
from vtc.method.registry import register
from vtc.ops.blocks import lengths
from vtc.ops.similarity import alignment, total


@register
class CosineRedundancy(ScoringCompressor):
    """Drop the tokens whose mean cosine to all tokens of their image is highest.

    Acts before the LLM on the projected tokens; training-free, text-agnostic, reads no attention. With unit rows x the
    score of token i is ``- x_i . mean_j x_j``, which ranks by the mean pairwise cosine without computing any pair
    (vLLM, ``vllm/multimodal/image_pruning.py``, its method "cosine"; no paper). Ties go to the lower index, kept tokens
    stay in raster order.

    scope: "item" compares the tokens of all crops or frames, "crop" those of each.

    Departures from the paper and its code: newline tokens stay and count for nobody's mean; the number that stays is
    rounded as for every method here, not down; nothing is remembered between two encodings of the same picture.

    >>> import vtc
    >>> vtc.create("cosine_redundancy", scope="crop")
    CosineRedundancy(scope='crop')
    """

    name: ClassVar[str] = "cosine_redundancy"

    @torch.no_grad()
    def score(self, view: StageView) -> Tensor:
        parts = Parts.of(view, self.scope)
        tokens = parts.take(view.tokens)
        weight = parts.mask / lengths(tokens).clamp(min=1e-12)
        mean = total(tokens, weight) / parts.mask.sum(1, keepdim=True).clamp(min=1)
        return parts.give(-alignment(tokens, mean))
