"""Token Transforming: X' = W X, row by row, and pruning and merging as its limits."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.methods.token_transforming import TokenTransforming
from vtc.testing.encoders import PATCHES, Act, Seen, importance
from vtc.testing.inside import InsideCase
from vtc.testing.inside.groups import cosine, nearest


def mixed(rows: Tensor, score: list[float], left: int, mode: str, tau: float) -> Tensor:
    """[left, D] one new token at a time."""
    number = range(len(rows))
    anchors = sorted(sorted(number, key=lambda n: (-score[n], n))[:left])
    into = {j: j if j in anchors else nearest({i: cosine(rows[j], rows[i]) for i in anchors}) for j in number}
    new = []
    for i in anchors:
        if mode == "o2o":
            weights = [float(j == i) for j in number]
        elif mode == "m2m":
            weights = torch.tensor([cosine(rows[i], rows[j]) / tau for j in number]).softmax(0).tolist()
        else:
            members = list(into.values()).count(i)
            weights = [float(into[j] == i) / members for j in number]
        new.append(torch.stack([weight * row for weight, row in zip(weights, rows, strict=True)]).sum(0))
    return torch.stack(new)


def plain(method: TokenTransforming, image: Tensor, lead: int, keep: int | None) -> Act:
    """Every stage leaves the same share of its patches."""
    stages = method.layers or (1, 2)  # three blocks: a quarter and half of them is the first

    def act(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        if seen is None or layer not in stages or keep is None:
            return rows, None
        left = round(PATCHES * (keep / PATCHES) ** ((stages.index(layer) + 1) / len(stages)))
        patches = mixed(rows[lead:], importance(seen, lead), left, method.mode, method.tau)
        return torch.cat([rows[:lead], patches]), None

    return act


CASE = InsideCase(plain, ({}, {"tau": 0.5, "layers": (2,)}, {"mode": "m2o"}, {"mode": "o2o", "layers": (1, 3)}))
