"""Memory of a selection grows with the tokens, not with their square; the page of `vtc.testing.scaling`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest
import torch

import vtc.methods
import vtc.ops
from vtc.method.base import EncoderStage
from vtc.ops import nearest
from vtc.testing import scaling
from vtc.testing.released import fresh
from vtc.testing.released.cases import selection_cases

EVERY = selection_cases()
CASES = {name: case for name, case in EVERY.items() if not isinstance(case.stage, EncoderStage)}
"""What sees all tokens of a prompt; inside the encoder a method sees one crop."""
SIDE, MOST = 90, 20
"""8100 tokens; so many times their rows in float32 are allowed, a quarter of all pairs is half as much again."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that they do not hide what grows, one round of k-means."""
    for package in (vtc.ops, vtc.methods):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for name, value in vars(importlib.import_module(info.name)).items():
                if name in ("BLOCK", "STORE", "PAIRS"):
                    monkeypatch.setattr(f"{info.name}.{name}", min(2**20, value))
    for streamed in (nearest.nearest, nearest.nearest_target):
        monkeypatch.setattr(streamed, "__defaults__", (2**20,))
    monkeypatch.setattr(scaling, "ITERATIONS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_no_selection_holds_all_pairs_of_tokens(name: str) -> None:
    method, view = scaling.seen(CASES[name], SIDE)
    view = fresh(view)
    limit = MOST * SIDE**2 * scaling.WIDTH * 4
    assert limit < SIDE**4  # bytes of a quarter of all pairs
    assert scaling.peak(lambda: method.select(view)) <= limit


def test_the_peak_counts_what_is_held_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            held = torch.empty(1000, 1000)  # 4 MB, freed in each turn
            held.sort(0)  # values, indices, and what the operation holds inside
            del held

    assert 4e6 + 4e6 + 8e6 <= scaling.peak(call) < 4e7


def test_a_row_has_slope_and_limit() -> None:
    found = [(100, 0.5, 10), (1000, 1.0, 2**20), (10000, 100.0, 3 * 2**30)]
    assert scaling.row("random", found) == ["random", "0.50", "1.00", "100.00", "2.00", "3072", "NO"]


def test_what_compares_frames_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scaling, "measure", lambda case: [(100, 1.0, 10)] * len(scaling.SIDES[:-1]) + [(1000, 2.0, 10)])
    scaling.main()
    named = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()]
    assert [name for name in EVERY if name in named] == [name for name, case in CASES.items() if not case.video]


def test_a_case_is_measured_at_every_size() -> None:
    found = scaling.measure(CASES["stride"], (8, 12))
    assert [tokens for tokens, _, _ in found] == [64, 144]
    assert all(ms > 0 and most > 0 for _, ms, most in found)
