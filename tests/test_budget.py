"""The one place where a retention becomes a count."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtc.errors import BudgetError
from vtc.method.budget import Budget, left_by_stages, spend, tokens_to_keep


def test_every_fraction_is_met_exactly() -> None:
    wrong = [(k, n) for n in range(1, 600) for k in range(1, n + 1) if tokens_to_keep(n, k / n) != k]
    assert wrong == []


def test_halves_round_up_and_one_token_always_stays() -> None:
    assert [tokens_to_keep(n, 0.5) for n in (1, 3, 5, 7)] == [1, 2, 3, 4]
    assert [tokens_to_keep(n, 1e-9) for n in (1, 2, 576)] == [1, 1, 1]
    assert tokens_to_keep(0, 0.5) == 0
    assert tokens_to_keep(7, 1.0) == 7


@given(st.integers(1, 5000), st.floats(1e-6, 1.0))
def test_counts_are_the_nearest_whole_number(tokens: int, retention: float) -> None:
    keep = tokens_to_keep(tokens, retention)
    assert 1 <= keep <= tokens
    exact = Fraction(tokens) * Fraction(retention)
    assert abs(keep - exact) <= Fraction(1, 2) + Fraction(1, 10**9) or keep == 1
    assert keep <= tokens_to_keep(tokens + 1, retention)


@given(st.integers(1, 3000), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_counts_grow_with_the_retention(tokens: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert tokens_to_keep(tokens, low) <= tokens_to_keep(tokens, high)


def test_a_budget_is_one_of_two_numbers() -> None:
    assert Budget(retention=0.25).tokens(576) == 144
    assert Budget(retention=1).tokens(576) == 576
    assert [Budget(keep=64).tokens(n) for n in (576, 64, 63, 1, 0)] == [64, 64, 63, 1, 0]
    assert Budget(keep=64) == Budget(keep=64) != Budget(keep=65)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(keep=64).keep = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"retention": np.float64(0.25)}, "retention=0.25, keep=None"),
        ({"retention": np.float32(0.5)}, "retention=0.5, keep=None"),
        ({"retention": np.int64(1)}, "retention=1.0, keep=None"),
        ({"retention": Fraction(1, 4)}, "retention=0.25, keep=None"),
        ({"keep": np.int32(64)}, "retention=None, keep=64"),
    ],
)
def test_numbers_of_other_libraries_become_plain(given: dict, plain: str) -> None:
    assert repr(Budget(**given)) == f"Budget({plain})"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "neither of retention and keep given; pass exactly one, for example retention=0.25 or keep=64"),
        ({"retention": 0.5, "keep": 3}, "both of retention and keep given; pass exactly one"),
        ({"retention": 0}, r"retention=0 is outside \(0, 1\].*for example 0.25 \(use keep=N"),
        ({"retention": 0.0}, r"retention=0.0 is outside \(0, 1\]"),
        ({"retention": -0.1}, r"retention=-0.1 is outside \(0, 1\]"),
        ({"retention": 1.0001}, r"retention=1.0001 is outside \(0, 1\]"),
        ({"retention": 64}, r"retention=64 is outside \(0, 1\].*use keep=N for an absolute count"),
        ({"retention": math.nan}, r"retention=nan is outside \(0, 1\]"),
        ({"retention": True}, r"retention=True is outside \(0, 1\]"),
        ({"retention": "0.5"}, r"retention='0.5' is outside \(0, 1\]"),
        ({"keep": 0}, "keep=0 is not a positive whole number of tokens per item, for example keep=64"),
        ({"keep": -3}, "keep=-3 is not a positive whole number"),
        ({"keep": 2.5}, "keep=2.5 is not a positive whole number"),
        ({"keep": True}, "keep=True is not a positive whole number"),
        ({"keep": "64"}, "keep='64' is not a positive whole number"),
        ({"keep": np.float64(64)}, r"keep=np.float64\(64.0\) is not a positive whole number"),
        ({"keep": 64.0}, "keep=64.0 is not a positive whole number"),
        ({"keep": math.nan}, "keep=nan is not a positive whole number"),
        ({"keep": [64]}, r"keep=\[64\] is not a positive whole number"),
        ({"retention": np.bool_(True)}, r"retention=np.True_ is outside \(0, 1\]"),
        ({"retention": np.float64("nan")}, r"retention=np.float64\(nan\) is outside \(0, 1\]"),
        ({"retention": [0.5]}, r"retention=\[0.5\] is outside \(0, 1\]"),
        ({"retention": {}}, r"retention={} is outside \(0, 1\]"),
    ],
)
def test_other_values_are_refused(given: dict, match: str) -> None:
    with pytest.raises(BudgetError, match=match):
        Budget(**given)


# --- pruning inside the LLM
def test_published_settings_of_pruning_after_two_layers() -> None:
    """The equal-compute counts of FastV at K = 2 in 32 layers."""
    assert [Budget(keep=a).tokens_from_layer(576, 2, 32) for a in (192, 128, 64)] == [166, 98, 30]
    assert Budget(retention=1 / 3).tokens_from_layer(576, 2, 32) == 166


@given(st.integers(1, 1200), st.integers(1, 80), st.data())
def test_the_mean_over_the_layers_meets_the_budget(count: int, layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, layers - 1))
    keep = data.draw(st.integers(1, count))
    budget = Budget(keep=keep)
    exact = Fraction(layers * keep - layer * count, layers - layer)
    if keep < count and exact < Fraction(1, 2):
        with pytest.raises(BudgetError, match=rf"cannot be met: {layer} of {layers} LLM layers see {count} tokens"):
            budget.tokens_from_layer(count, layer, layers)
        return
    later = budget.tokens_from_layer(count, layer, layers)
    assert 1 <= later <= count
    mean = Fraction(layer * count + (layers - layer) * later, layers)
    assert abs(mean - keep) <= Fraction(layers - layer, 2 * layers)


def test_a_budget_that_is_met_anyway_keeps_everything() -> None:
    assert Budget(retention=1.0).tokens_from_layer(576, 31, 32) == 576
    assert Budget(keep=600).tokens_from_layer(576, 2, 32) == 576
    assert Budget(keep=3).tokens_from_layer(576, 32, 32) == 576
    assert Budget(keep=3).tokens_from_layer(576, 0, 32) == 3


def test_the_error_names_a_budget_that_works() -> None:
    with pytest.raises(BudgetError, match=r"a mean of 30 of 576 visual tokens per layer.*at least 37 tokens") as caught:
        Budget(keep=30).tokens_from_layer(576, 2, 32)
    assert str(caught.value) == (
        "a mean of 30 of 576 visual tokens per layer cannot be met: 2 of 32 LLM layers see 576 tokens before any is "
        "dropped; ask for at least 37 tokens (retention 0.065), prune earlier or merge more"
    )
    assert Budget(keep=37).tokens_from_layer(576, 2, 32) == 1


@given(st.integers(2, 1200), st.integers(2, 80), st.data())
def test_the_named_budget_always_works(count: int, layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(1, layers - 1))
    try:
        Budget(keep=1).tokens_from_layer(count, layer, layers)
    except BudgetError as error:
        least = int(str(error).split("at least ")[1].split(" tokens")[0])
        assert Budget(keep=least).tokens_from_layer(count, layer, layers) >= 1
        share = float(str(error).split("(retention ")[1].split(")")[0])
        assert Budget(retention=min(1.0, share)).tokens_from_layer(count, layer, layers) >= 1


# --- one solver
@pytest.mark.parametrize(
    ("tokens", "least", "granted", "fixed", "spans", "left"),
    [
        (576, 47, 192, 0, (3, 4, 4, 4, 17), (361, 226, 141, 88)),
        (576, 47, 128, 0, (3, 4, 4, 4, 17), (243, 102, 47, 47)),
        (576, 1, 72, 0, (2, 8, 8, 14), (114, 23, 4)),
        (2880, 231, 720, 24, (3, 4, 4, 4, 17), (1405, 686, 335, 231)),
        (150, 12, 17, 1, (3, 4, 4, 4, 17), (3, 2, 2, 2)),
        (7, 1, 3, 0, (1, 1, 2), (3, 1)),
        (16, 2, 15, 3, (1, 3), (11,)),
        (0, 0, 1, 5, (3, 4), (0,)),
    ],
)
def test_stages_leave_what_they_left(
    tokens: int, least: int, granted: int, fixed: int, spans: tuple[int, ...], left: tuple[int, ...]
) -> None:
    assert left_by_stages(tokens, least, granted, fixed, tokens + fixed, tuple(spans)) == left


def test_what_every_layer_sees_counts() -> None:
    with pytest.raises(BudgetError) as caught:
        left_by_stages(576, 1, 144, 24, 600, (8, 8, 8, 8))
    assert str(caught.value) == (
        "a mean of 144 of 600 visual tokens per layer cannot be met: 8 of 32 LLM layers see 576 tokens and 24 "
        "separators before any is dropped; ask for at least 169 tokens (retention 0.282), prune earlier or merge more"
    )
    assert left_by_stages(576, 1, 169, 24, 600, (8, 8, 8, 8)) == (2, 1, 1)


SPANS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(st.integers(0, 400), SPANS, st.integers(0, 9), st.integers(0, 4000))
def test_no_point_of_the_curve_comes_closer(most: int, spans: list[int], fixed: int, total: int) -> None:
    """Against trying every count."""
    points = [[max(0, count - 3 * number) for number in range(len(spans))] for count in range(most + 1)]

    def seen(counts: list[int]) -> int:
        return sum(span * (count + fixed) for span, count in zip(spans, counts, strict=True))

    found = spend(total, spans, lambda x: points[min(most, math.floor((most + 1) * x))], fixed=fixed, slack=math.inf)
    nearest = min(points, key=lambda counts: abs(seen(counts) - total))
    assert abs(seen(found) - total) == abs(seen(nearest) - total)
    if total < seen(points[0]):
        with pytest.raises(BudgetError, match=f"ask for at least {math.ceil(seen(points[0]) / sum(spans))} tokens, pr"):
            spend(total, spans, lambda x: points[0], fixed=fixed)
