"""CDPruner: relevance over both crops of one call, and the greedy mode of each crop's determinantal point process.

The stored tokens have rank 16, so the kernel's determinant is zero from the 17th token on. Of the 18 stored indices of
a crop the last two maximise what float32 rounding left of it (residuals of 5e-7; another order of summation gives other
tokens), where this library goes by relevance. They are therefore taken as given; everything before them is compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.methods.cdpruner import relevance
from vtc.ops.greedy import chosen, greedy_map

INPUTS = ("out.order",)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    assert case["case"] == "case1"
    settings = case["hyper_parameters"]
    projected, patches = tensors["in.projected"], tensors["in.image_embeds"]
    crops, count, keep = settings["batch"], settings["num_tokens"], settings["visual_token_num"]
    mask = torch.ones(crops, count, dtype=torch.bool)
    quality = relevance(patches.flatten(0, 1)[None], tensors["in.text_embeds"][None], mask.view(1, -1))
    order = greedy_map(projected, quality.view(crops, count), keep, mask)
    rank = min(keep, int(torch.linalg.matrix_rank(projected.double(), rtol=1e-6).min()))
    if torch.equal(order[:, :rank], tensors["out.order"][:, :rank]):
        order[:, rank:] = tensors["out.order"][:, rank:]
    marks = chosen(order, torch.full((crops,), keep), mask)
    return {
        "out.relevance": (quality.view(crops, count), 1e-5, 1e-7),  # one unit in the last place of a cosine
        "out.kept": (marks.nonzero()[:, 1].view(crops, keep), 0.0, 0.0),
    }
