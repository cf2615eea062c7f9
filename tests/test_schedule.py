"""Schedules over the depth of the LLM: against the papers' equations, on methods and models, and their searches."""

from __future__ import annotations

import dataclasses
import math
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtc
import vtc.testing
from vtc.errors import BudgetError, VTCError
from vtc.method.base import ModelSpec
from vtc.method.schedule import Cosine, Schedule, Sigmoid, rates, scaled, shape
from vtc.method.search import g_search, sigmoid_search
from vtc.method.text import parse
from vtc.testing import make_view, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
STAGED = ("pyramiddrop", "sparsevlm", "v2drop")
SCHEDULED = (*STAGED, "transprune", "fastv", "dart", "fitprune")


@given(st.sets(st.integers(1, 31), min_size=1, max_size=5), st.integers(2, 96), st.integers(0, 1))
def test_layers_keep_their_relative_depth(layers: set[int], depth: int, first: int) -> None:
    found = scaled(sorted(layers), depth, first=first, last=depth - 2)
    plain = []
    for layer in sorted(layers):
        near = max(first, min(range(depth + 1), key=lambda each: (abs(each - layer * depth / 32), -each)))
        if near not in plain and near <= depth - 2:
            plain.append(near)
    assert found == tuple(plain)


# --- shapes
def p_sigmoid(steepness: float, mean: float, layers: int) -> list[float]:
    """The card's equation, b by bisection, with a first layer that sees everything."""
    low, high = -1e3, 1e3
    for _ in range(200):
        b = (low + high) / 2
        found = [1 / (1 + math.exp(min(600, steepness * (layer / layers - b)))) for layer in range(1, layers)]
        low, high = (b, high) if 1 + sum(found) < mean * layers else (low, b)
    return [1.0, *found]


@given(st.floats(0.1, 100), st.integers(2, 48), st.floats(0, 1))
def test_sigmoid_rates_are_those_of_the_equation(steepness: float, layers: int, share: float) -> None:
    mean = 1 / layers + (0.01 + 0.98 * share) * (1 - 1 / layers)
    found = rates(Sigmoid(steepness), mean, layers)
    assert found == pytest.approx(p_sigmoid(steepness, mean, layers), abs=1e-6)
    assert sum(found) / layers == pytest.approx(mean, abs=1e-9)
    assert list(found) == sorted(found, reverse=True)


def test_cosine_is_the_published_decay() -> None:
    """p-MoD: max(0.15, min(1, 0.5 + 0.5 cos(pi l / 31))) of 32 layers."""
    plain = [max(0.15, min(1.0, 0.5 + 0.5 * math.cos(math.pi * layer / 31))) for layer in range(32)]
    assert Cosine(0.15)(0.5, (1,) * 32) == pytest.approx(plain[1:])
    assert rates(Cosine(0.15), sum(plain) / 32, 32) == pytest.approx(plain, abs=1e-6)
    for x, every in ((0.0, 0.15), (1.0, 1.0)):
        assert Cosine(0.15)(x, (2, 3, 27)) == [every, every]
    assert [Sigmoid(9)(x, (2, 3, 27)) for x in (0.0, 1.0)] == [pytest.approx([y, y], abs=1e-12) for y in (0.0, 1.0)]


@pytest.mark.parametrize("written", ["sigmoid(8)", "sigmoid(0.5)", "sigmoid(60)", "cosine", "cosine(0.05)"])
@pytest.mark.parametrize("method", SCHEDULED)
def test_shapes_meet_the_budget(method: str, written: str) -> None:
    chosen: Any = vtc.create(method, schedule=written)
    assert chosen.needs_budget
    assert chosen.starts(LLAMA) == tuple(range(1, 32))
    for retention in (0.12, 0.25, 0.5, 0.9, 0.99):
        view = make_view([(24, 24), (7, 9)], spec=LLAMA, retention=retention)
        counts = [view.items.counts]
        for start in range(1, 32):
            here = dataclasses.replace(view, items=dataclasses.replace(view.items, counts=counts[-1]))
            counts.append(chosen.left(here, start))
        for granted, column in zip(view.granted, zip(*counts, strict=True), strict=True):
            assert abs(sum(column) / 32 - granted) <= 0.5
            assert list(column) == sorted(column, reverse=True)
            assert column[-1] >= 1
    with pytest.raises(BudgetError):
        chosen.left(make_view([(24, 24)], spec=LLAMA, retention=0.03), 1)


# --- rates
@given(st.lists(st.sampled_from([1.0, 0.8, 0.5, 0.1, 0.0]), min_size=1, max_size=39), st.integers(2, 40))
def test_equal_neighbours_are_one_stage(some: list[float], layers: int) -> None:
    written = (1.0, *sorted(some, reverse=True))
    found = Schedule.read(written, layers)
    depths = [place / max(1, len(written) - 1) for place in range(len(written))]
    near = [
        min(range(len(written)), key=lambda place: (round(abs(depths[place] - layer / (layers - 1)), 9), -place))
        for layer in range(layers)
    ]
    each = [written[place] for place in near]
    groups = [(rate, len([*same])) for rate, same in groupby(each)]
    assert found.spans == tuple(span for _, span in groups)
    assert (1.0, *found.shares) == tuple(rate for rate, _ in groups)  # type: ignore[misc]
    assert found.mean == pytest.approx(sum(each) / layers)


@pytest.mark.parametrize("method", ["pyramiddrop", "v2drop", "transprune", "fastv", "dart", "fitprune"])
@torch.no_grad()
def test_every_layer_sees_its_rate(method: str) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5], ["image", 9]], model=model)
    for written in ((1, 1, 0.7, 0.33), (1, 0.5), (1, 0.5, 0.5, 0.0)):
        chosen = vtc.create(method, schedule=written)
        assert not chosen.needs_budget
        with vtc.compress(model, chosen) as handle:
            model(**inputs)
        seen = [each for layers, (each, _) in handle.stats.calls[0].entering for _ in range(layers)]
        spread = written if len(written) == 4 else (1, 1, 0.5, 0.5)
        assert seen == [max(1, math.floor(16 * rate + 0.5)) for rate in spread]


@pytest.mark.parametrize("name", ["pyramiddrop", "fastv", "dart", "fitprune"])
def test_rates_keep_the_contract(name: str) -> None:
    for written in ("sigmoid(6)", (1, 0.8, 0.4, 0.3)):
        method = vtc.create(name, schedule=written)
        vtc.testing.check_method(method, models=["llava-next"], generation=["greedy"], steps=2)


@pytest.mark.parametrize("name", ["fastv", "dart"])
@torch.no_grad()
def test_each_stage_of_a_schedule_is_the_method_at_its_layer(name: str) -> None:
    """The first stage keeps what the method alone keeps there, the second what it makes of the tokens that are left."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5], ["image", 9]], model=model)
    chosen = vtc.create(name, schedule=(1, 1, 0.5, 0.25))
    views: list[Any] = []
    select = type(chosen).select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(chosen), "select", lambda self, view: views.append(view) or select(self, view))
        with vtc.compress(model, chosen) as handle:
            model(**inputs)
    alone = vtc.create(name, layer=2)
    with vtc.compress(model, alone, retention=0.75) as one:  # 2 layers of 16 tokens and 2 of 8
        model(**inputs)
    later = dataclasses.replace(views[1], budget=vtc.Budget(keep=13))
    last_view = dataclasses.replace(
        later, items=dataclasses.replace(later.items, input_counts=(16, 16), fixed=(0, 0))
    )  # 3 layers of 16 tokens and one of 4
    last = vtc.create(name, layer=3).select(last_view).keep
    for number, (item, first) in enumerate(zip(handle.trace[0].items, one.trace[0].items, strict=True)):
        assert item.kept[2].tolist() == first.kept[2].tolist()
        assert len(item.kept[2]) == 8
        assert item.kept[3].tolist() == item.kept[2][last[number, :8]].tolist()
        assert len(item.kept[3]) == 4


@pytest.mark.parametrize("name", ["fastv", "dart", "fitprune"])
def test_schedules_stand_alone(name: str) -> None:
    other = {"fastv": {"ratio": 0.5}, "dart": {"layer": 0}, "fitprune": {"weights": "some.safetensors"}}[name]
    with pytest.raises(VTCError, match=f"schedule says where tokens leave .* leave out .*{next(iter(other))}"):
        vtc.create(name, schedule="cosine", **other)
    with pytest.raises(VTCError, match="is no schedule; write"):
        vtc.create(name, schedule="linear")
    assert not vtc.create(name, schedule=(1, 0.5)).needs_budget
    assert vtc.create(name, schedule="cosine").needs_budget


# --- as text
def test_schedules_can_be_written() -> None:
    text = "pyramiddrop(schedule=sigmoid(8), rank_by=before)@0.25, v2drop(schedule=(1, 0.5)), v2drop(schedule=cosine)"
    (first,), (second,), (third,) = parse(text)
    assert first.parameters == {"schedule": "sigmoid(8)", "rank_by": "before"}
    assert first.budget == vtc.Budget(0.25)
    assert second.parameters == {"schedule": (1.0, 0.5)}
    assert third.parameters == {"schedule": "cosine"}
    assert [shape(each) for each in ("sigmoid( 8. )", "cosine", "cosine(0.15)")] == [
        Sigmoid(8), Cosine(0), Cosine(0.15)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sigmoid"}, r"schedule='sigmoid' is no schedule; write sigmoid\(8\), cosine, cosine\(0.15\), or"),
        ({"schedule": "linear(3)"}, "is no schedule"),
        ({"schedule": "sigmoid(0)"}, r"sigmoid\(0\) does not fall; pass a steepness above 0, such as sigmoid\(8\)"),
        ({"schedule": "cosine(1)"}, r"cosine\(1\) has no least share of \[0, 1\); p-MoD's is cosine\(0.15\)"),
        ({"schedule": (0.9, 0.5)}, r"schedule=\(0.9, 0.5\) does not fall from 1 to 0 or more: .* write sigmoid"),
        ({"schedule": (1, 0.2, 0.5)}, "does not fall from 1"),
        ({"schedule": (1, -0.2)}, "does not fall from 1"),
        ({"schedule": (1, 1)}, "does not fall from 1"),
        ({"schedule": ()}, "does not fall from 1"),
        ({"schedule": 3}, "is not a tuple of finite numbers or a string or None"),
        ({"schedule": "cosine", "layers": (1, 5)}, "leave out layers and ratios beside it"),
        ({"schedule": "cosine", "ratios": (0.5, 0.4, 0.3)}, "leave out layers and ratios beside it"),
    ],
)
@pytest.mark.parametrize("method", STAGED)
def test_schedules_that_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VTCError, match=message):
        vtc.create(method, **options)


# --- searches
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.sampled_from([0.0, 0.005, 0.3]))
def test_g_search_is_the_greedy_scan(needs: list[int], tolerance: float) -> None:
    calls: list[tuple[float, ...]] = []

    def metric(given: tuple[float, ...]) -> float:
        calls.append(given)
        return 2 - sum(max(0.0, need / 20 - rate) for need, rate in zip(needs, given, strict=True))

    untouched = metric((1.0,) * len(needs))
    calls.clear()
    found = g_search(metric, untouched, len(needs), tolerance=tolerance)
    evaluations = len(calls)
    plain = [1.0]
    for layer in range(1, len(needs)):
        for point in range(1, 21):  # the smallest first
            rest = len(needs) - layer
            if metric((*plain, *[point / 20] * rest)) >= untouched * (1 - tolerance):
                break
        plain.append(min(point / 20, plain[-1]))
    assert found == tuple(plain)
    assert evaluations <= 5 * (len(needs) - 1)
    assert all(len(each) == len(needs) and each[0] == 1 for each in calls)


@pytest.mark.parametrize(("steepness", "mean"), [(2.0, 0.5), (7.0, 0.3), (30.0, 0.7)])
def test_sigmoid_search_finds_the_steepness(steepness: float, mean: float) -> None:
    target = rates(Sigmoid(steepness), mean, 32)
    means = []

    def metric(given: tuple[float, ...]) -> float:
        means.append(sum(given) / 32)
        return -sum((a - b) ** 2 for a, b in zip(given, target, strict=True))

    assert sigmoid_search(metric, 32, mean) == pytest.approx(steepness, rel=0.15)
    assert means == pytest.approx([mean] * 14)
    assert sigmoid_search(lambda given: 0.0, 32, mean) == 1.0  # of equals the least steep


def test_searches_that_are_refused() -> None:
    for options in ({"layers": 0}, {"layers": 4, "tolerance": -1}, {"layers": 4, "step": 0}):
        with pytest.raises(VTCError, match=r"pass the layers of the LLM, .* and a step of rates up to 1"):
            g_search(lambda given: 0.0, 0.0, **options)  # type: ignore[arg-type]
    for more in ({"between": (3.0, 2.0)}, {"points": 2}):
        with pytest.raises(VTCError, match="pass rising bounds above 0, and at least 3 points"):
            sigmoid_search(lambda given: 0.0, 4, 0.5, **more)  # type: ignore[arg-type]
    for mean in (0.2, 1.1, 0.0):
        with pytest.raises(VTCError, match=r"is no share that 4 layers can see; pass one above 0.250, up to 1"):
            rates(Sigmoid(8), mean, 4)
