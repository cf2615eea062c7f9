"""VidCom2 against its rules, one frame and one token at a time."""

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
from vtc.method.base import Needs
from vtc.ops.frames import quotas
from vtc.testing import TINY_MODELS
from vtc.testing.plain.frames import plain_shares


def plain_nearness(x: Tensor, centre: Tensor) -> float:
    return sum(math.exp(-float((x - centre).square().sum()) / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))


def plain_scores(x: Tensor, frames: list[list[int]]) -> tuple[list[float], list[list[float]]]:
    """Mean v of each frame, and v + u of its tokens."""
    x = x.double()
    variance = [float((column - column.mean()).square().mean()) for column in x.T]
    quiet = sorted(range(len(variance)), key=lambda c: (variance[c], c))[: len(variance) // 2]
    x = x[:, sorted(quiet)]
    x = x / x.norm(dim=1, keepdim=True)
    g = x.mean(0)
    near, both = [], []
    for members in frames:
        centre = x[members].mean(0)
        v = [plain_nearness(x[j], g) for j in members]
        near.append(sum(v) / len(v))
        both.append([a + plain_nearness(x[j], centre) for a, j in zip(v, members, strict=True)])
    return near, both


def plain_choice(x: Tensor, frames: list[list[int]], keep: int, temperature: float) -> list[int]:
    near, both = plain_scores(x, frames)
    power = [math.exp((min(near) - each) / temperature) for each in near]
    weight = [len(m) * (1 + each / sum(power) - 1 / len(frames)) for each, m in zip(power, frames, strict=True)]
    quota = plain_shares(weight, keep, [len(members) for members in frames], 1)
    kept = []
    for members, scores, count in zip(frames, both, quota, strict=True):
        order = sorted(range(len(members)), key=lambda place: (scores[place], place))
        kept += [members[place] for place in order[:count]]
    return sorted(kept)


def frames_of(view: Any, item: int) -> list[list[int]]:
    """Places of the tokens of each frame; pictures are one."""
    layout, count = view.items.layouts[item], view.items.counts[item]
    size = count // layout.n_crops if layout.kind == "video" else count
    return [list(range(first, first + size)) for first in range(0, count, size)]


def moving(view: Any) -> Any:
    """The view with frames of different brightness: some stand out."""
    hidden = view.hidden.clone()
    return dataclasses.replace(view, states=type(view.states)(hidden + 0.5 * hidden[:, :1]))


@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 2}, {"keep": 13}, {"keep": 60}, {"retention": 0.3}], ids=str)
def test_the_plain_choice(make_view: Any, video: Any, kept: Any, budget: Any, temperature: float) -> None:
    shapes = [video(4, 3, 5), (7, 9), video(1, 2, 3), video(7, 3, 3), (1, 1), video(2, 8, 8)]
    view = moving(make_view(shapes, width=9, **budget))
    found = kept(view, vtc.create("vidcom2", temperature=temperature).select(view))
    for item, count in enumerate(view.items.counts):
        tokens, frames = view.tokens[item, :count], frames_of(view, item)
        assert found[item] == plain_choice(tokens, frames, view.keep[item], temperature)


def test_scores_are_those_of_the_plain_loop(make_view: Any, video: Any) -> None:
    view = make_view([video(5, 4, 4), (6, 6)], width=12, retention=0.4)
    scores = vtc.create("vidcom2").select(view).scores
    for item, count in enumerate(view.items.counts):
        _, both = plain_scores(view.tokens[item, :count], frames_of(view, item))
        expected = torch.tensor([-each for frame in both for each in frame])
        assert float((scores[item, :count] - expected).abs().max()) <= 5e-5


def test_a_frame_that_stands_out_keeps_more(make_view: Any, video: Any) -> None:
    """Five frames of one scene, the third of another one: it takes nearly twice its share, the code's 2 r."""
    view = make_view([video(5, 6, 6)], width=16, retention=0.25)
    hidden = 0.1 * view.hidden
    place = view.items.index[0]
    hidden[0, place] += 1.0
    hidden[0, place[2 * 36 : 3 * 36]] -= 2.0
    view = dataclasses.replace(view, states=type(view.states)(hidden))
    marks = vtc.create("vidcom2").select(view).keep[0].view(5, 36).sum(1).tolist()
    assert sum(marks) == 45 and marks[2] >= 15 and max(marks[:2] + marks[3:]) <= 8


def test_tiles_of_a_picture_are_one_frame(make_view: Any, shape: Any, video: Any, kept: Any) -> None:
    view = make_view([shape(((1, 3, 3), (2, 6, 7)), newlines=True), video(3, 4, 4)], width=9, keep=20)
    found = kept(view, vtc.create("vidcom2").select(view))
    for item, count in enumerate(view.items.counts):
        places = plain_choice(view.tokens[item, :count], frames_of(view, item), view.keep[item], 0.01)
        assert found[item] == view.items.token[item, places].tolist()


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 30)), min_size=1, max_size=7), st.integers(0, 2), st.data())
def test_shares_are_exact(groups: list[tuple[float, int]], least: int, data: st.DataObject) -> None:
    weight, size = [max(1e-3, w) for w, _ in groups], [n for _, n in groups]
    keep = data.draw(st.integers(0, sum(size)))
    given_ = torch.tensor([weight], dtype=torch.double), torch.tensor([keep]), torch.tensor([size])
    found = quotas(*given_, least=least)[0].tolist()
    lowest = [min(least, n) for n in size] if sum(min(least, n) for n in size) <= keep else [0] * len(size)
    assert sum(found) == keep
    assert all(low <= count <= n for low, count, n in zip(lowest, found, size, strict=True))
    exact = plain_shares(weight, keep, size, least)
    assert all(abs(count - other) <= 1 for count, other in zip(found, exact, strict=True))


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("vidcom2")) == {"temperature": 0.01}
    for reference in vtc.adapters.families()["qwen2.5-vl"].references:
        plan = vtc.create("vidcom2").plan(reference)
        assert (plan.stages, plan.needs, plan.positions) == ((0,), Needs(), "preserve")
    for temperature in (0.0, -1.0):
        with pytest.raises(VTCError, match=r"divides what frames differ by; pass a number above 0, the code has 0.01"):
            vtc.create("vidcom2", temperature=temperature)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "vidcom2", 0.4)
