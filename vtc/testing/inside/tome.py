"""ToMe inside an encoder, one token at a time."""

from __future__ import annotations

from torch import Tensor

from vtc.methods.tome import ToMe
from vtc.testing.encoders import BLOCKS, PATCHES, Act
from vtc.testing.inside import InsideCase
from vtc.testing.inside.groups import Group, alike, joined, merging


def step(tokens: list[Group], r: int, has_cls: bool) -> list[Group]:
    """A and B alternate, the class token first in A; the r best edges merge; unmerged A, then B, as released."""
    a, b = (tokens[1::2], tokens[0::2]) if has_cls else (tokens[0::2], tokens[1::2])
    edges = []
    for place, token in enumerate(a):
        proposals = [(alike(token, other), place, n) for n, other in enumerate(b)]
        edges.append(max(proposals, key=lambda edge: (edge[0], -edge[2])))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    rest = edges[r:] if not has_cls else sorted(edges[r:], key=lambda edge: edge[1])
    merged = [joined(each, [a[p] for _, p, n in edges[:r] if n == number], True) for number, each in enumerate(b)]
    return [a[place] for _, place, _ in rest] + merged


def plain(method: ToMe, image: Tensor, lead: int, keep: int | None) -> Act:
    """The same number of tokens merges behind every block."""
    plans = method.steps(BLOCKS, PATCHES, keep)
    return merging(method, lead, plans, lambda tokens, r, block: step(tokens, r, lead > 0))


CASE = InsideCase(plain, ({}, {"proportional": False}, {"metric": "features"}, {"r": (3, 5)}))
