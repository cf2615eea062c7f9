"""Orders and places in groups, one row and one entry at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops import rank as ops
from vtc.testing.plain import OpCase, Size


def order_by(group: Tensor, best: Tensor) -> Tensor:
    """The function with keys that have names."""
    return ops.order_by(group, best=best)


def plain_order_by(group: Tensor, best: Tensor) -> Tensor:
    """Python's sort by pairs."""
    pairs = [list(zip(*row, strict=True)) for row in zip(group.tolist(), (-best).tolist(), strict=True)]
    return torch.tensor([sorted(range(len(row)), key=row.__getitem__) for row in pairs])


def plain_run_starts(ordered: Tensor) -> Tensor:
    return torch.tensor([[at == 0 or row[at] != row[at - 1] for at in range(len(row))] for row in ordered.tolist()])


def plain_inverse(order: Tensor) -> Tensor:
    return torch.tensor([[row.index(entry) for entry in range(len(row))] for row in order.tolist()])


def plain_rank_in_group(group: Tensor, best: Tensor) -> Tensor:
    """Count who stands in front of an entry in its own group."""
    out = []
    for numbers, values in zip(group.tolist(), best.tolist(), strict=True):
        entries = range(len(numbers))
        front = [
            [at for at in entries if numbers[at] == numbers[me] and (-values[at], at) < (-values[me], me)]
            for me in entries
        ]
        out.append([len(each) for each in front])
    return torch.tensor(out)


def plain_dense_rank(values: Tensor, group: Tensor, tolerance: float) -> Tensor:
    """Sort a group's values; a step of more than the tolerance opens the next line."""
    out = []
    for row, numbers in zip(values.tolist(), group.tolist(), strict=True):
        lines: dict[tuple[int, float], int] = {}
        for number in set(numbers):
            ordered = sorted(value for value, own in zip(row, numbers, strict=True) if own == number)
            line = 0
            for place, value in enumerate(ordered):
                line += place > 0 and value - ordered[place - 1] > tolerance
                lines[number, value] = line
        out.append([lines[number, value] for value, number in zip(row, numbers, strict=True)])
    return torch.tensor(out)


def _grouped(size: Size) -> dict[str, Any]:
    """Scores with ties in groups whose numbers start below zero."""
    items, tokens = (3, 37) if size == "small" else (32, 1024)
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(items, tokens, generator=generator) * 9).round()
    return {"group": torch.randint(-1, 4, (items, tokens), generator=generator), "best": scores}


def _order(size: Size) -> dict[str, Any]:
    return {"order": torch.rand(_grouped(size)["best"].shape, generator=torch.Generator().manual_seed(1)).argsort(1)}


def _lines(size: Size) -> dict[str, Any]:
    items, tokens = (4, 37) if size == "small" else (64, 2880)
    place = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).expand(items, -1)
    side = 7 if size == "small" else 54
    return {
        "values": place // side * 2.0 + 0.5,
        "group": torch.arange(tokens).expand_as(place) % 3 - 1,
        "tolerance": 0.01,
    }


CASES = (
    OpCase(order_by, plain_order_by, _grouped),
    OpCase(ops.inverse, plain_inverse, _order),
    OpCase(ops.run_starts, plain_run_starts, lambda size: {"ordered": _grouped(size)["group"].sort(1).values}),
    OpCase(ops.rank_in_group, plain_rank_in_group, _grouped),
    OpCase(ops.dense_rank, plain_dense_rank, _lines),
)
