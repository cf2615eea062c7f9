"""SCOPE against its rule, one token at a time; `vtc.testing.plain.coverage` has the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.ops import coverage as ops
from vtc.ops.coverage import coverage
from vtc.testing import TINY_MODELS
from vtc.testing.plain.coverage import plain_coverage

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def plain_choice(x: Tensor, attention: Tensor, keep: int, alpha: float) -> list[int]:
    if not keep:
        return []
    every = torch.ones(1, len(x), dtype=torch.bool)
    return sorted(plain_coverage(x[None], attention.double()[None] ** alpha, keep, every)[0].tolist())


def seen(make_view: Any, shapes: Any, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    scores = [torch.rand(n, generator=generator).mul(40).ceil().div(1000) for n in counts]
    features = [torch.randn(n, 8, generator=generator) for n in counts]
    readings = (spec.patch_attention, Rows.HIDDEN)
    recorded = {(spec.key_layer, reading): each for reading, each in zip(readings, (scores, features), strict=True)}
    return make_view(shapes, vision=recorded, spec=spec, **budget)


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["crop", "item"])
@pytest.mark.parametrize("keep", [1, 9, 24])
def test_the_plain_choice(
    make_view: Any, kept: Any, parted: Any, shape: Any, spec: ModelSpec, alpha: float, scope: Any, keep: int
) -> None:
    shapes = [shape(((1, 3, 3), (1, 4, 5)), newlines=True), (5, 5), (1, 1), shape(((3, 3, 3),))]
    view = seen(make_view, shapes, spec, keep=keep)
    found = kept(view, vtc.create("scope", alpha=alpha, scope=scope).select(view))
    reading = spec.patch_attention
    for item in range(len(view.items)):
        expected: list[int] = []
        for part, few in parted(view, item, scope):
            a, x = (view.vision_attention(spec.key_layer, each)[item, part] for each in (reading, Rows.HIDDEN))
            expected += [int(view.items.token[item, part[j]]) for j in plain_choice(x, a, few, alpha)]
        assert found[item] == sorted(expected)


def test_held_or_streamed_the_choice_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, worth = torch.randn(5, 30, 8, generator=generator), torch.rand(5, 30, generator=generator)
    mask = torch.rand(5, 30, generator=generator) < 0.8
    whole = coverage(x, worth, 9, mask)
    assert torch.equal(whole, plain_coverage(x, worth, 9, mask))
    monkeypatch.setattr(ops, "at_once", lambda numbers, device: 7)
    for store in (10, 900, 2000):
        monkeypatch.setattr(ops, "STORE", store)
        assert torch.equal(coverage(x, worth, 9, mask), whole)


def test_equals_go_to_the_lower_index_and_no_token_twice() -> None:
    every = torch.ones(1, 5, dtype=torch.bool)
    assert coverage(torch.ones(1, 5, 3), torch.ones(1, 5), 5, every).tolist() == [[0, 1, 2, 3, 4]]


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("scope")) == {"alpha": 1.0, "scope": "crop"}
    for spec, layer, reading in ((CLIP_L, 22, Rows.CLS), (QWEN, 31, Rows.RECEIVED)):
        plan = vtc.create("scope").plan(spec)
        assert plan.needs == Needs(vision={layer: (reading, Rows.HIDDEN)})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
    with pytest.raises(VTCError, match=r"alpha=-0.5 would prefer what nothing attends to; pass 0 or more"):
        vtc.create("scope", alpha=-0.5)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "scope", 0.4)
