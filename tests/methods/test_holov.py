"""HoloV against its rules, one run and one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.methods import holov
from vtc.methods.holov import share
from vtc.testing import TINY_MODELS

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
SHAPES = [(7, 9), (8, 8), (1, 1), (2, 3), (9, 12)]


def plain_share(w: list[float], keep: int, sizes: list[int]) -> list[int]:
    quota = [math.floor(keep * each / sum(w)) for each in w]
    falling = sorted(range(len(w)), key=lambda p: (-round(w[p], 6), p))
    for p in falling[: keep - sum(quota)]:
        quota[p] += 1
    held = [min(q, size) for q, size in zip(quota, sizes, strict=True)]
    for p in falling:
        held[p] += min(sizes[p] - held[p], keep - sum(held))
    return held


def plain_choice(x: Tensor, attention: list[float], keep: int, runs: int) -> list[int]:
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    sizes = [len(x) // runs + (p < len(x) % runs) for p in range(runs)]
    parts, first = [], 0
    for size in sizes:
        parts.append(list(range(first, first + size)))
        first += size
    weights = []
    for part in parts:
        a, v = [1000 * attention[i] for i in part], []
        for i in part:
            like = [0.0 if i == j else float(unit[i] @ unit[j]) for j in part]
            mean = sum(like) / max(1, len(part) - 1)
            v.append(sum((each - mean) ** 2 for each in like) / max(1, len(part) - 1))
        mean_a, mean_v = (sum(each) / max(1, len(part)) for each in (a, v))
        scores = [p + 0.09 * q * mean_a / (mean_v + 1e-6) for p, q in zip(a, v, strict=True)]
        weights.append(sum(scores) / max(1, len(part)))
    kept = []
    for part, quota in zip(parts, plain_share(weights, keep, sizes), strict=True):
        kept += sorted(part, key=lambda i: (-attention[i], i))[:quota]
    return sorted(kept)


def seen(make_view: Any, shapes: Any = SHAPES, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    scores = [torch.randn(n, generator=generator).mul(1.5).exp().mul(20).round().div(1000) for n in counts]
    return make_view(shapes, vision={spec.key_layer: scores}, spec=spec, **budget)


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("runs", [16, 5, 1, None])
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 13}, {"keep": 60}, {"retention": 0.3}], ids=str)
def test_the_plain_choice(make_view: Any, kept: Any, spec: ModelSpec, runs: Any, budget: Any) -> None:
    view = seen(make_view, spec=spec, **budget)
    found = kept(view, vtc.create("holov", runs=runs).select(view))
    for item, count in enumerate(view.items.counts):
        keep = view.keep[item]
        number = runs or max(1, int(1024 * count / (576 * keep)))
        attention = view.vision_attention(spec.key_layer)[item, :count].tolist()
        assert found[item] == plain_choice(view.tokens[item, :count], attention, keep, number)


def test_crops_form_one_sequence(make_view: Any, kept: Any, shape: Any) -> None:
    view = seen(make_view, [shape(((1, 3, 3), (2, 6, 7)), newlines=True), (5, 5)], keep=20)
    found = kept(view, vtc.create("holov").select(view))
    for item, count in enumerate(view.items.counts):
        attention = view.vision_attention(22)[item, :count].tolist()
        places = plain_choice(view.tokens[item, :count], attention, view.keep[item], 16)
        assert found[item] == view.items.token[item, places].tolist()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 7)), min_size=1, max_size=6), st.data())
def test_shares_are_exact_and_fit(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    sizes = [size for _, size in runs]
    weights = [float(weight) * (size > 0) for weight, size in runs]
    if not sum(weights):
        return
    keep = data.draw(st.integers(0, sum(sizes)))
    found = share(torch.tensor([weights]), torch.tensor([keep]), torch.tensor([sizes]))[0].tolist()
    assert sum(found) == keep and all(0 <= q <= size for q, size in zip(found, sizes, strict=True))
    if all(size for size in sizes):
        assert found == plain_share(weights, keep, sizes)


@pytest.mark.parametrize("held", [40, 400])
def test_blocks_change_nothing(held: int, make_view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some runs, and of some tokens of one run."""
    view = seen(make_view, keep=40)
    whole = vtc.create("holov").select(view).keep
    monkeypatch.setattr(holov, "BLOCKS", (held, held))
    assert torch.equal(vtc.create("holov").select(view).keep, whole)


def test_a_crowd_does_not_take_it_all(make_view: Any, kept: Any) -> None:
    """A quarter of the picture has the sixteen most attended patches, and keeps only its share."""
    scores = torch.full((64,), 0.01)
    scores[:16] = 0.02
    view = make_view([(8, 8)], vision={22: [scores]}, keep=16)
    assert kept(view, vtc.create("fastervlm").select(view)) == [list(range(16))]
    (numbers,) = kept(view, vtc.create("holov", runs=4).select(view))
    assert 5 <= sum(number < 16 for number in numbers) <= 9


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("holov")) == {"runs": 16}
    for spec, layer, reading in ((CLIP_L, 22, Rows.CLS), (QWEN, 31, Rows.RECEIVED)):
        plan = vtc.create("holov").plan(spec)
        assert plan.needs == Needs(vision={layer: reading})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
    with pytest.raises(VTCError, match="runs=0 cuts nothing; pass at least 1, the code uses 16, or None"):
        vtc.create("holov", runs=0)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "holov", 0.4)
