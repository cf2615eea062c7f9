"""EVS against its rules, one token at a time."""

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

CLIPS = [(4, 3, 5), (1, 2, 3), (7, 3, 3), (2, 8, 8)]


def plain_choice(x: Tensor, size: int, keep: int) -> list[int]:
    """x: tokens of frames of `size` tokens each."""
    if keep < size:
        return [math.ceil(Fraction((2 * part + 1) * size, 2 * keep)) - 1 for part in range(keep)]
    x = x.double()
    change = [
        math.inf if j < size else 1 - float(x[j] @ x[j - size] / (x[j].norm() * x[j - size].norm()))
        for j in range(len(x))
    ]
    return sorted(sorted(range(len(x)), key=lambda j: (-round(change[j], 6), j))[:keep])


@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 9}, {"keep": 20}, {"keep": 61}, {"retention": 0.6}], ids=str)
def test_the_plain_choice(make_view: Any, video: Any, kept: Any, budget: Any) -> None:
    view = make_view([video(*each) for each in CLIPS] + [(7, 9)], **budget)
    found = kept(view, vtc.create("evs").select(view))
    for item, size in enumerate([15, 6, 9, 64, 63]):
        tokens = view.tokens[item, : view.items.counts[item]]
        assert found[item] == plain_choice(tokens, size, view.keep[item])


def test_only_what_moves_stays(make_view: Any, video: Any, kept: Any) -> None:
    """A still scene in which two tokens change: in the third frame, and back in the fourth; then ties by index."""
    view = make_view([video(5, 4, 4)], keep=16 + 5)
    hidden, place = view.hidden.clone(), view.items.index[0]
    for frame in range(1, 5):
        hidden[0, place[16 * frame : 16 * frame + 16]] = hidden[0, place[:16]]
    hidden[0, place[[2 * 16 + 5, 2 * 16 + 11]]] *= -1
    view = dataclasses.replace(view, states=type(view.states)(hidden))
    assert kept(view, vtc.create("evs").select(view)) == [[*range(17), 37, 43, 53, 59]]


def test_below_one_frame_it_is_thinned_evenly(make_view: Any, video: Any, kept: Any) -> None:
    view = make_view([video(3, 4, 4), (4, 4)], keep=4)
    assert kept(view, vtc.create("evs").select(view)) == [[1, 5, 9, 13]] * 2


def test_what_follows_a_removed_token_is_new(make_view: Any, video: Any) -> None:
    """An earlier stage removed tokens 3 and 9 of frames 0 and 1; those behind them come first of all later ones."""
    view = make_view([video(3, 2, 4)], keep=10)
    stays = view.items.mask & (view.items.token != 3) & (view.items.token != 9)
    items = view.items.kept(stays, [22], torch.arange(view.visual.shape[1]).expand_as(view.visual))
    view = dataclasses.replace(view, items=items)
    marks = vtc.create("evs").select(view).keep[0]
    numbers = items.token[0, marks].tolist()
    assert len(numbers) == 10 and set(numbers) >= {0, 1, 2, 4, 5, 6, 7, 11, 17}


def test_the_plan() -> None:
    assert dataclasses.asdict(vtc.create("evs")) == {}
    plan = vtc.create("evs").plan(vtc.adapters.families()["qwen3-vl"].references[0])
    assert (plan.stages, plan.needs, plan.positions) == ((0,), Needs(), "preserve")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "evs", 0.6)
