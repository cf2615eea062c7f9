"""DyCoke's first stage against its rules, one frame and one token at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.method.base import Needs
from vtc.testing import TINY_MODELS

CLIPS = [(8, 3, 3), (1, 2, 3), (7, 2, 4), (2, 8, 8), (5, 3, 4)]


def plain_choice(x: Tensor, size: int, keep: int, shares: Any) -> list[int]:
    """x: tokens of frames of `size` tokens each. shares: splits a number over sizes by the largest remainder."""
    frames = len(x) // size
    first, later = [f for f in range(frames) if f % 4 == 0], [f for f in range(frames) if f % 4]
    if keep < size * len(first):
        kept = []
        for frame, count in zip(first, shares(keep, [size] * len(first)), strict=True):
            middles = [Fraction((2 * part + 1) * size, 2 * count) for part in range(count)]
            kept += [frame * size + math.ceil(middle) - 1 for middle in middles]
        return kept
    kept = [frame * size + place for frame in first for place in range(size)]
    for frame, count in zip(later, shares(keep - len(kept), [size] * len(later)) if later else [], strict=True):
        before = {1: frame - 1, 2: frame - 2, 3: frame - 1}[frame % 4]
        like = [
            float(torch.cosine_similarity(x[frame * size + p].double(), x[before * size + p].double(), dim=0))
            for p in range(size)
        ]
        order = sorted(range(size), key=lambda p: (round(like[p], 6), p))
        kept += [frame * size + p for p in order[:count]]
    return sorted(kept)


@pytest.mark.parametrize(
    "budget", [{"keep": 1}, {"keep": 17}, {"retention": 0.2}, {"retention": 0.45}, {"retention": 0.8}], ids=str
)
def test_the_plain_choice(make_view: Any, video: Any, kept: Any, shares: Any, budget: Any) -> None:
    view = make_view([video(*each) for each in CLIPS] + [(7, 9)], **budget)
    found = kept(view, vtc.create("dycoke").select(view))
    for item, size in enumerate([9, 6, 8, 64, 12, 63]):
        tokens = view.tokens[item, : view.items.counts[item]]
        assert found[item] == plain_choice(tokens, size, view.keep[item], shares)


def test_the_papers_shares(make_view: Any, video: Any) -> None:
    """K = 0.7 of 20 tokens: one frame whole, the other three keep 6."""
    view = make_view([video(8, 4, 5)], retention=(1 + 3 * 0.3) / 4)
    marks = vtc.create("dycoke").select(view).keep[0].view(8, 20).sum(1).tolist()
    assert marks == [20, 6, 6, 6] * 2


def test_what_changed_stays(make_view: Any, video: Any, kept: Any) -> None:
    """A still scene in which one token of each thinned frame changes, against the frame that it is compared with."""
    view = make_view([video(4, 3, 3)], keep=9 + 3)
    hidden, place = view.hidden.clone(), view.items.index[0]
    for frame in range(1, 4):
        hidden[0, place[9 * frame : 9 * frame + 9]] = hidden[0, place[:9]]
    hidden[0, place[[9 + 4, 27 + 7]]] *= -1  # only in frames 1 and 3
    hidden[0, place[18 + 2]] *= -1
    hidden[0, place[27 + 2]] *= -1  # stays as in frame 2
    view = dataclasses.replace(view, states=type(view.states)(hidden))
    assert kept(view, vtc.create("dycoke").select(view)) == [[*range(9), 13, 20, 34]]


def test_the_plan() -> None:
    assert dataclasses.asdict(vtc.create("dycoke")) == {}
    plan = vtc.create("dycoke").plan(vtc.adapters.families()["llava-onevision"].references[0])
    assert (plan.stages, plan.needs, plan.positions) == ((0,), Needs(), "compact")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "dycoke", 0.6)
