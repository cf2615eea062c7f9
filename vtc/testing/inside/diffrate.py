"""DiffRate, one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.methods.diffrate import DiffRate
from vtc.testing.encoders import BLOCKS, PATCHES, Act, Seen, importance
from vtc.testing.inside import InsideCase
from vtc.testing.inside.groups import cosine, nearest


def tail(
    rows: Tensor, sizes: list[float], score: list[float], pruned: int, left: int
) -> tuple[list[Tensor], list[float]]:
    """Rows and sizes of what one block leaves, in the order of the picture."""
    order = sorted(range(len(rows)), key=lambda n: (-score[n], n))[:pruned]
    first = sorted(order[:left])
    members, grown = {n: [rows[n]] for n in first}, {n: sizes[n] for n in first}
    for n in order[left:]:
        alike = {goal: cosine(rows[n], rows[goal]) for goal in first}
        best = nearest(alike)
        members[best].append(rows[n])
        grown[best] += alike[best] * sizes[n]
    return [torch.stack(members[n]).mean(0) for n in first], [grown[n] for n in first]


def plain(method: DiffRate, image: Tensor, lead: int, keep: int | None) -> Act:
    """Behind every block the last in the order of importance leave."""
    plans, kept = method.steps(BLOCKS, PATCHES, keep, int(lead > 0)), [1.0] * PATCHES

    def act(layer: int, rows: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None]:
        if seen is None:
            return rows, None
        patches, kept[:] = tail(rows[lead:], kept, importance(seen, lead), *plans[layer - 1])
        sizes = torch.tensor([1.0] * lead + [max(size, 1e-6) for size in kept])
        return torch.cat([rows[:lead], torch.stack(patches)]), sizes if method.proportional else None

    return act


LISTS = {"prune": (16, 13, 9), "merge": (15, 11, 6)}
CASE = InsideCase(plain, ({}, {"share": 0.2}, {"proportional": False}, LISTS))
