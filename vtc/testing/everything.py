"""Everything that is registered, checked on one model."""

from __future__ import annotations

import torch

from vtc import adapters
from vtc.errors import UnsupportedMethod
from vtc.method.base import CacheStage, Compressor, ModelSpec
from vtc.method.registry import METHODS, create
from vtc.testing.contract import Deviation, check_method
from vtc.testing.models import tiny_model
from vtc.testing.probes import FixedKeep, LastRowTopK

STEPS, RETENTION = 3, 0.7
MODES = ("greedy", "beam 3", "no cache")
PROBES = (FixedKeep(at=(0, 1, 3)), FixedKeep(at=(1, CacheStage(2))), LastRowTopK())
"""Methods that act at every kind of stage, for what no registered method does on some model."""


def small(name: str) -> Compressor:
    """The method as it runs on rasters as small as those of the tiny models."""
    return create(name, **METHODS.get(name).small)


def runs(method: Compressor, spec: ModelSpec) -> bool:
    """False where the method refuses models of this kind; those of the vision encoder alone need one that lets them."""
    try:
        return bool(method.plan(spec).stages)
    except UnsupportedMethod:
        return False


def limits(method: Compressor) -> dict[str, float]:
    """`RETENTION`, or the only one that the method takes; nothing for methods without a budget.

    >>> limits(small("pool")), limits(small("quecc")), limits(small("atp"))
    ({'retention': 0.7}, {'retention': 0.25}, {})
    """
    return {"retention": method.only_retention or RETENTION} if method.needs_budget else {}


def check(model: str) -> list[Deviation]:
    """Every method with its own position policy and in `MODES`, and `PROBES` with all of both; on one thread."""
    torch.set_num_threads(1)
    spec = adapters.of(tiny_model(model)).spec
    cells: list[Deviation] = []
    for name in METHODS.names():
        method = small(name)
        if not runs(method, spec):
            continue
        policies = [method.plan(spec).positions]
        cells += check_method(
            method, models=[model], steps=STEPS, **limits(method), policies=policies, generation=MODES
        )
    for probe in PROBES:
        cells += check_method(probe, models=[model], steps=STEPS, retention=RETENTION)
    return cells
