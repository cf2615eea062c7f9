"""Random batches, items, stages and keep rates on every family: pruning equals masking, whatever comes together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtc
from vtc.method.base import Positions
from vtc.testing import TINY_MODELS, FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, against_oracle

EXAMPLES = 40
"""Per family; the draws are seeded by hypothesis' derandomisation, so every run sees the same ones."""


@st.composite
def layouts(draw: Any, kinds: tuple[str, ...]) -> list[list[Any]]:
    """One to three rows of text with up to two items each, at least one item in all, no empty text around them."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[Any] = [draw(st.integers(1, 6))]
        for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
            row += [draw(st.sampled_from(kinds)), draw(st.integers(1, 5))]
        rows.append(row)
    if not any(isinstance(part, str) for row in rows for part in row):
        rows[0] += [kinds[0], 3]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_MODELS)
def test_pruning_equals_masking(name: str) -> None:
    model = tiny_model(name)

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        layout=layouts(TINY_MODELS[name].kinds),
        at=st.sets(st.integers(0, 3), min_size=1, max_size=3),
        rate=st.sampled_from([0.0, 0.05, 0.4, 0.5, 0.95, 1.0]),
        static=st.booleans(),
        positions=st.sampled_from(["preserve", "compact"]),
        extra=st.sampled_from([0, 3]),
        seed=st.integers(0, 99),
    )
    def check(
        layout: list[list[Any]],
        at: set[int],
        rate: float,
        static: bool,
        positions: Positions,
        extra: int,
        seed: int,
    ) -> None:
        inputs = tiny_inputs(name, layout, seed=seed, extra=extra, model=model)
        method = FixedKeep(at=tuple(sorted(at)), rate=rate, seed=seed, static=static)
        worst = against_oracle(model, inputs, lambda m: vtc.compress(m, method, positions=positions), 4)
        assert worst <= LIMIT, (layout, at, rate, static, positions, extra, seed)

    check()
