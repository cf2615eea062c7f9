"""PiToMe inside an encoder, one token at a time."""

from __future__ import annotations

import math

from torch import Tensor

from vtc.methods.pitome import PiToMe
from vtc.testing.encoders import BLOCKS, PATCHES, Act
from vtc.testing.inside import InsideCase
from vtc.testing.inside.groups import Group, alike, joined, merging, nearest


def step(tokens: list[Group], r: int, margin: float, weighted: bool) -> list[Group]:
    """The 2 r tokens of highest energy may merge: even ranks join the odd rank most like them."""

    def elu(x: float) -> float:
        return x if x > 0 else math.exp(x) - 1

    energy = [sum(elu(alike(a, b) - margin) for b in tokens) / len(tokens) for a in tokens]
    ranks = sorted(range(len(tokens)), key=lambda n: -energy[n])
    sources, targets = ranks[: 2 * r : 2], ranks[1 : 2 * r : 2]
    chosen = {s: nearest({n: alike(tokens[s], tokens[n]) for n in targets}) for s in sources}
    return [
        joined(token, [tokens[s] for s in sources if chosen[s] == n], weighted)
        for n, token in enumerate(tokens)
        if n not in sources
    ]


def plain(method: PiToMe, image: Tensor, lead: int, keep: int | None) -> Act:
    """Every block keeps the same share of its tokens; the margin falls with depth."""
    plans = method.steps(BLOCKS, PATCHES, keep)

    def one(tokens: list[Group], r: int, block: int) -> list[Group]:
        return step(tokens, r, 0.9 - 0.9 * block / BLOCKS, method.weighted)

    return merging(method, lead, plans, one)


AS_FOR_CLIP = {"metric": "features", "weighted": False, "proportional": False}
CASE = InsideCase(plain, ({}, AS_FOR_CLIP, {"ratio": 0.75}))
