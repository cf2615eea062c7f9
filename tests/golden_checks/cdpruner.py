"""CDPruner: relevance over both crops of one call, and the greedy mode of each crop's determinantal point process.

The case's relevance compares embeddings that no multimodal LLM has, so the method is shown one item twice: its quality
is asked for with the case's patch embeddings as tokens and its text embedding as the question, and handed to the choice
among the projected tokens. These have rank 16, so the kernel's determinant is zero from the 17th token on. Of the 18
stored indices of a crop the last two maximise what float32 rounding left of it (residuals of 5e-7; another order of
summation gives other tokens), where this library goes by relevance. They are therefore taken as given; everything
before them is compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import _replay as replay
import torch
from _replay import Outputs
from torch import Tensor

import vtc
from vtc.method.base import StageView
from vtc.method.states import States
from vtc.testing import Shape, make_view


def shown(view: StageView, tokens: Tensor, text: Tensor) -> StageView:
    """The view with other tokens [1, N, D], and `text` [M, D] as what its question consists of."""
    rows = view.items.scatter(tokens, torch.zeros(*view.visual.shape, tokens.shape[2]))
    place = view.text[0].nonzero().flatten()[: len(text)]
    return replace(view, states=States(rows.index_put((torch.zeros_like(place), place), text)))


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, method = replay.settings(case), vtc.create("cdpruner")
    projected, stored = tensors["in.projected"], tensors["out.order"]
    crops, count, keep = settings["batch"], settings["num_tokens"], settings["visual_token_num"]
    view = make_view([Shape(((crops, 8, count // 8),))], keep=crops * keep)
    asked = shown(view, tensors["in.image_embeds"].flatten(0, 1)[None], tensors["in.text_embeds"])
    quality = method.quality(asked)  # type: ignore[attr-defined]
    view = shown(view, projected.flatten(0, 1)[None], torch.empty(0, projected.shape[2]))
    with replay.watched(type(method), "quality", lambda self, view: quality):
        rank = min(keep, int(torch.linalg.matrix_rank(projected.double(), rtol=1e-6).min()))
        picked = replay.again(method, view, keep=crops * rank).view(crops, count)
    known = picked.gather(1, stored[:, :rank]).all(1, keepdim=True)
    marks = picked.scatter(1, stored[:, rank:], True) & known
    return {
        "out.relevance": (quality.view(crops, count), 1e-5, 1e-7),  # one unit in the last place of a cosine
        "out.kept": (marks.nonzero()[:, 1].view(-1, keep), 0.0, 0.0),
    }


CHECKS = {"in.projected": replay.Check(check, given=("in.", "out.order"))}
