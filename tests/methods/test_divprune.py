"""DivPrune against its definition, token by token, and the cutting of items into crops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs
from vtc.method.groups import Groups, largest_share
from vtc.method.states import States
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

SHAPES = [(7, 9), (16, 16), (1, 1), (2, 3), (1, 2)]
CLIP = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def plain_choice(x: Tensor, keep: int) -> list[int]:
    """Max-min diversity, greedily: x [n, D] -> ascending places."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    distance = (1 - unit @ unit.T).tolist()
    every = range(len(x))
    nearest = [min((round(distance[i][j], 9) for j in every if j != i), default=0.0) for i in every]
    taken = [max(every, key=lambda i: (nearest[i], -i))]
    while len(taken) < keep:
        free = [j for j in every if j not in taken]
        taken.append(max(free, key=lambda j: (min(distance[j][s] for s in taken), -j)))
    return sorted(taken)


@pytest.mark.parametrize("budget", [{"keep": 1}, {"retention": 0.1}, {"keep": 30}], ids=str)
def test_the_plain_choice(make_view: Any, kept: Any, budget: Any) -> None:
    view = make_view(SHAPES, **budget)
    found = kept(view, vtc.create("divprune").select(view))
    for item, numbers in enumerate(found):
        count, keep = view.items.counts[item], view.keep[item]
        expected = plain_choice(view.tokens[item, :count], keep) if keep < count else list(range(count))
        assert numbers == expected


def test_only_directions_matter_and_the_first_of_two_equals_wins(make_view: Any, kept: Any) -> None:
    view = make_view([(4, 4), (1, 2)], keep=5)
    method = vtc.create("divprune")
    scale = torch.rand(*view.hidden.shape[:2], 1) + 0.2
    scaled = dataclasses.replace(view, states=States(view.hidden * scale))
    assert kept(view, method.select(view)) == kept(scaled, method.select(scaled))
    pair = make_view([(1, 2)], keep=1)
    assert kept(pair, method.select(pair)) == [[0]]  # each is the other's nearest
    same = dataclasses.replace(view, states=States(torch.ones_like(view.hidden)))
    assert kept(same, method.select(same)) == [[0, 1, 2, 3, 4], [0, 1]]
    nothing = dataclasses.replace(view, states=States(torch.zeros_like(view.hidden)))
    assert kept(nothing, method.select(nothing)) == [[0, 1, 2, 3, 4], [0, 1]]


@pytest.mark.parametrize("scope", ["item", "crop"])
def test_crops_choose_together_or_apart(make_view: Any, kept: Any, shares: Any, shape: Any, scope: Any) -> None:
    shapes = [shape(((1, 3, 3), (2, 2, 7)), newlines=True), (5, 5), shape(((6, 3, 3),))]
    view = make_view(shapes, keep=13)
    found = kept(view, vtc.create("divprune", scope=scope).select(view))
    for item, numbers in enumerate(found):
        count = view.items.counts[item]
        crop = view.crop[item, :count].tolist()
        groups = [[p for p in range(count) if scope == "item" or crop[p] == c] for c in range(max(crop) + 1)]
        groups = groups[:1] if scope == "item" else groups
        split = shares(view.keep[item], [len(group) for group in groups])
        expected: list[int] = []
        for group, keep in zip(groups, split, strict=True):
            places = plain_choice(view.tokens[item, group], keep) if keep else []
            expected += [int(view.items.token[item, group[place]]) for place in places]
        assert numbers == sorted(expected)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.data())
def test_no_crop_takes_more_steps_than_allowed(sizes: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, sum(sizes)))
    exact = vtc.ops.select.apportion(torch.tensor([keep]), torch.tensor([sizes]))[0]
    assert int(exact.max()) <= largest_share(keep, sum(sizes), sizes) <= int(exact.max()) + 2
    thinned = [data.draw(st.integers(0, size)) for size in sizes]
    if sum(thinned):
        keep = data.draw(st.integers(1, sum(thinned)))
        exact = vtc.ops.select.apportion(torch.tensor([keep]), torch.tensor([thinned]))[0]
        assert int(exact.max()) <= largest_share(keep, sum(thinned), sizes)


def test_crops_that_an_earlier_stage_thinned(make_view: Any, kept: Any, shape: Any) -> None:
    """One crop has lost nearly all, another nothing."""
    view = make_view([shape(((3, 4, 4),)), (3, 3)], keep=12)
    alive = view.items.mask.clone()
    alive[0, 1:16], alive[0, 20:30] = False, False
    places = torch.arange(view.hidden.shape[1]).expand(view.hidden.shape[:2])
    items = view.items.kept(alive, [23, 9], places)
    view = dataclasses.replace(view, items=items)
    groups = Groups.of(view, "crop")
    assert groups.parts.mask.sum(1).tolist() == [1, 6, 16, 9, 0, 0]
    assert groups.keep.tolist() == [1, 3, 8, 9, 0, 0]
    assert groups.steps >= 9
    found = kept(view, vtc.create("divprune", scope="crop").select(view))
    assert [len(numbers) for numbers in found] == [12, 9]
    assert set(found[0]) <= {0, *range(16, 20), 30, 31, *range(32, 48)}


def test_taking_and_marking_are_inverse(make_view: Any, shape: Any) -> None:
    view = make_view([shape(((3, 4, 4),)), shape(((1, 2, 2), (1, 5, 5)))], keep=10**4)
    groups = Groups.of(view, "crop")
    crop = groups.parts.take(view.crop)
    row = torch.arange(len(crop)) % 3
    assert torch.equal(crop[groups.parts.mask], row[:, None].expand_as(crop)[groups.parts.mask])
    everything = torch.arange(groups.parts.mask.shape[1]).expand_as(groups.parts.mask)
    assert torch.equal(groups.chosen(everything), view.items.mask)


def test_a_long_video_fits_into_memory(peak_memory: Any) -> None:
    """The search for the first token streams over pairs."""
    setup = "from vtc.ops.greedy import most_isolated\nx, mask = torch.randn(1, 12000, 8), torch.ones(1, 12000).bool()"
    assert peak_memory(setup, "most_isolated(x, mask)") < 400 * 2**20  # the cosines of all pairs alone are 550 MiB


# --- plans and models
def test_plans_and_refusals() -> None:
    method = vtc.create("divprune")
    assert method.scope == "item"
    for spec, positions in ((CLIP, "compact"), (SIGLIP, "compact"), (QWEN, "preserve")):
        plan = method.plan(spec)
        assert (plan.stages, plan.needs, plan.positions) == ((0,), Needs(), positions)
    with pytest.raises(VTCError, match=r"unknown scope 'frame'.*crop"):
        vtc.create("divprune", scope="frame")


def test_the_kept_set_is_the_one_computed_by_hand() -> None:
    inputs = tiny_inputs("llava-siglip", [[3, "image", 5, "image", 2], [2, "image", 9]], seed=4)
    model = tiny_model("llava-siglip")
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        with vtc.compress(model, "divprune", keep=6) as handle:
            model(**inputs)
    assert [item.kept[0].tolist() for item in handle.trace[0].items] == [plain_choice(x, 6) for x in features]


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("scope", ["item", "crop"])
@pytest.mark.parametrize("retention", [0.3, 0.75])
def test_the_budget_is_met(name: str, scope: Any, retention: float) -> None:
    model = tiny_model(name)
    kind = TINY_MODELS[name].kinds[-1]
    inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12], [9]], seed=3, model=model)
    with vtc.compress(model, "divprune", retention=retention, scope=scope) as handle, torch.no_grad():
        model(**inputs)
    granted = [0] * 3
    for item in handle.trace[0].items:
        granted[item.row] += vtc.tokens_to_keep(len(item.positions), retention)
    assert handle.stats.calls[0].visual_tokens_kept == pytest.approx(granted)


def test_it_composes_with_the_second_stage_of_todre() -> None:
    model = tiny_model("llava-next")
    inputs = tiny_inputs("llava-next", [[3, "image", 5], [2, "image", 9]])
    parts = [vtc.create("divprune"), vtc.create("todre", diversity=False, tau=1.0)]
    with vtc.compress(model, parts, retention=[0.5, None]) as handle:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert handle.stats.retention == pytest.approx(0.5 * 0.75, abs=0.02)
    assert handle.stats.calls[0].stages[-1].visual_tokens_out == 0
