"""Everything that is registered, checked on one model."""

from __future__ import annotations

from typing import Any

import torch

from vtc.registry import create, list_methods
from vtc.testing.contract import Deviation, check_adapter, check_method

STEPS, RETENTION = 4, 0.7
OPTIONS: dict[str, dict[str, Any]] = {"vqtoken": {"resample": True}}
"""What methods need on rasters as small as those of the tiny models."""


def check(model: str) -> list[Deviation]:
    """Every method and every stage on one model, on one thread."""
    torch.set_num_threads(1)
    cells: list[Deviation] = []
    for name in list_methods():
        method = create(name, **OPTIONS.get(name, {}))
        cells += check_method(method, models=[model], steps=STEPS, retention=RETENTION)
    return cells + check_adapter(model, steps=STEPS)
