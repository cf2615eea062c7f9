"""Reference for `vtc.ops.coverage`: every step computes every gain from scratch in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops.coverage import coverage
from vtc.testing.plain import OpCase, Size
from vtc.testing.plain.greedy import cosines, members


def plain_coverage(features: Tensor, worth: Tensor, steps: int, mask: Tensor) -> Tensor:
    """One item after the other."""
    rows = []
    for item in range(len(mask)):
        like, places, chosen = cosines(features[item]), members(mask, item), list[int]()
        while len(chosen) < steps:
            covered = {u: max([0.0, *(like[u][j] for j in chosen)]) for u in places}
            value = {j: float(worth[item, j]) * sum(max(0.0, like[u][j] - covered[u]) for u in places) for j in places}
            chosen.append(max((j for j in places if j not in chosen), key=lambda j: (round(value[j], 6), -j)))
        rows.append(chosen)
    return torch.tensor(rows)


def _drawn(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    items, length, steps = (3, 13, 6) if size == "small" else (5, 576, 64)
    mask = torch.rand(items, length, generator=generator) < 0.9
    worth = torch.rand(items, length, generator=generator)
    return {
        "features": torch.randn(items, length, 8, generator=generator),
        "worth": worth,
        "steps": steps,
        "mask": mask,
    }


CASES = (OpCase(coverage, plain_coverage, _drawn),)
