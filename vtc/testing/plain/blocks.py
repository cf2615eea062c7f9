"""Lengths and distances row by row, in double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.ops.blocks import distances, lengths
from vtc.testing.plain import OpCase, Size


def plain_lengths(rows: Tensor) -> Tensor:
    """|x|, row by row."""
    return torch.tensor([[float(x.double().norm()) for x in item] for item in rows])


def plain_distances(rows: Tensor, others: Tensor, place: Tensor) -> Tensor:
    """|x - y|, row by row."""
    columns = zip(rows.double(), others.double(), place, strict=True)
    return torch.tensor([[float((x - y[p]).norm()) for x, p in zip(x, at, strict=True)] for x, y, at in columns])


def _rows(size: Size) -> dict[str, Any]:
    shape = (3, 37, 9) if size == "small" else (8, 2880, 896)
    return {"rows": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _pairs(size: Size) -> dict[str, Any]:
    rows = _rows(size)["rows"]
    generator = torch.Generator().manual_seed(1)
    others = torch.randn(rows.shape[0], 2 * rows.shape[1], rows.shape[2], generator=generator)
    return {
        "rows": rows,
        "others": others,
        "place": torch.randint(others.shape[1], rows.shape[:2], generator=generator),
    }


CASES = (OpCase(lengths, plain_lengths, _rows, 1e-6), OpCase(distances, plain_distances, _pairs, 1e-6))
