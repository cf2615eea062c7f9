"""MustDrop against its equations: windows pair by pair, the filter token by token, counts by search; then on models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import CacheStage, EncoderStage, ModelSpec, Needs, Rows, StageView
from vtc.method.budget import left_by_stages
from vtc.method.groups import Parts
from vtc.method.states import States
from vtc.methods.mustdrop.dual import dual_filter, keep_with_keys, key_tokens, utilities
from vtc.methods.mustdrop.method import TEXT
from vtc.methods.mustdrop.windows import merge_windows, merged_first, raster_windows, window_members, window_similarity
from vtc.ops.select import in_groups
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain import dual as plain_dual
from vtc.testing.plain import windows as plain_windows

LLAVA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
NEXT = dataclasses.replace(LLAVA, family="llava-next", single_crop=False)
SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32, encoder_stages=True, single_crop=True)
INTERN = ModelSpec("internvl", 24, 23, True, tuple(range(24)), 28)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
FRONT = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, single_crop=True)
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


# --- functions, at odd sizes
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_windows_of_rasters(regions: list[tuple[int, int, int]], window: tuple[int, int]) -> None:
    found = raster_windows(regions, window)
    assert torch.equal(found, plain_windows.plain_raster_windows(regions, window))


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([(2, 2), (1, 3), (3, 2), (3, 3)]), st.integers(0, 9**6))
def test_merging_windows(height: int, width: int, window: tuple[int, int], seed: int) -> None:
    """Tokens missing, equal tokens (ties), windows chosen at random."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(window)
    number = raster_windows([(1, height, width)], window).expand(2, -1)
    number = number.masked_fill(torch.rand(number.shape, generator=generator) < 0.05, -1)
    most = (height // window[0]) * (width // window[1])
    members, whole = window_members(number, most, size)
    assert torch.equal(whole, plain_windows.plain_window_members(number, most, size)[1])
    x = torch.randint(-1, 2, (2, height * width, 3), generator=generator).float()
    similarity = window_similarity(x, members, whole)
    expected = plain_windows.plain_window_similarity(x, members, whole)
    assert torch.allclose(similarity, expected, atol=1e-6)
    chosen = whole & (torch.rand(whole.shape, generator=generator) < 0.5)
    tokens, keep, into = merge_windows(x, members, chosen)
    for ours, theirs in zip((tokens, keep, into), plain_windows.plain_merge_windows(x, members, chosen), strict=True):
        assert torch.equal(ours, theirs)
    coarse = similarity.mul(2).round()
    order = merged_first(keep, members, chosen, coarse)
    assert torch.equal(order, plain_windows.plain_merged_first(keep, members, chosen, coarse))
    assert torch.equal(order.sort(1).values, torch.arange(height * width).expand(2, -1))


VALUES = st.sampled_from([0.0, 0.125, 0.25, 0.25, 0.5])


@given(st.data(), st.integers(1, 9), st.floats(0.01, 1.0), st.floats(0.05, 0.6))
def test_the_filter(data: st.DataObject, width: int, gamma: float, alpha: float) -> None:
    row = st.lists(VALUES, min_size=width, max_size=width)
    total = torch.tensor([data.draw(row) for _ in range(3)])
    peak = total * torch.tensor([data.draw(row) for _ in range(3)])
    mask = (
        torch.arange(width) < torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=3, max_size=3)))[:, None]
    )
    group = torch.arange(width).expand(3, -1) // 4
    found = dual_filter(total, peak, gamma, alpha, mask)
    assert torch.equal(found, plain_dual.plain_dual_filter(total, peak, gamma, alpha, mask))
    utility = utilities(total, peak, gamma, alpha, mask)
    assert torch.allclose(utility, plain_dual.plain_utilities(total, peak, gamma, alpha, mask), rtol=1e-5)
    away = (utility - 1).abs() > 1e-5  # off the thresholds, where rounding decides
    anything = total.masked_fill(~mask, 0).sum(1, keepdim=True) > 0
    assert torch.equal((utility >= 1) & away & anything, found & away & anything)
    rate = data.draw(st.sampled_from([0.0, 0.08, 0.25, 0.5, 1.0]))
    place, real = (each.flatten(0, 1) for each in in_groups(group, 3, 4, mask))
    tiles = Parts(real, place, mask)
    key = key_tokens(total, tiles, rate)
    assert torch.equal(key, plain_dual.plain_key_tokens(total, tiles, rate))
    keep = torch.tensor(data.draw(st.lists(st.integers(0, width + 1), min_size=3, max_size=3)))
    best = keep_with_keys(utility, key, keep, mask)
    assert torch.equal(best, plain_dual.plain_keep_with_keys(utility, key, keep, mask))
    assert torch.equal(best.sum(1), keep.minimum(mask.sum(1)))


@pytest.mark.parametrize("rate", [0.08, 0.05, 0.07])
def test_the_key_set_is_rounded_up_as_in_python(rate: float) -> None:
    for count in [*range(1, 60), 75, 100, 576]:
        mask = torch.ones(1, count, dtype=torch.bool)
        key = key_tokens(torch.rand(1, count), Parts(mask, None, mask), rate)
        assert int(key.sum()) == math.ceil(rate * count)


def test_tokens_far_beyond_the_memory_of_pairs(peak_memory: Any) -> None:
    setup = (
        "from vtc.methods.mustdrop.windows import *; from vtc.methods.mustdrop.dual import *;"
        "from vtc.method.groups import Parts; "
        "x = torch.randn(1, 98304, 256).bfloat16()"
    )
    code = (
        "number = raster_windows([(96, 32, 32)], (2, 2))[None]; members, whole = window_members(number, 24576, 4);"
        "similarity = window_similarity(x, members, whole); merge_windows(x, members, similarity > 0);"
        "mask = number >= 0; utility = utilities(x[..., 0], x[..., 1], 0.001, 0.001, mask);"
        "tiles = Parts(whole[0, :, None].expand(-1, 4), members[0], mask);"
        "keep_with_keys(utility, key_tokens(utility, tiles, 0.08), torch.tensor([999]), mask)"
    )
    assert peak_memory(setup, code) < 2**28  # 50 MB of features in, one copy out


# --- how many tokens
SPANS = st.lists(st.integers(1, 17), min_size=2, max_size=5)


@given(st.integers(1, 3000), st.floats(0, 0.3), st.integers(0, 40), SPANS, st.floats(0.01, 1))
def test_the_schedule_meets_the_budget(tokens: int, rate: float, fixed: int, spans: list[int], share: float) -> None:
    keys, layers = math.ceil(rate * tokens), sum(spans)
    granted = vtc.tokens_to_keep(tokens + fixed, share)
    total = layers * (granted - fixed)
    room = (total - spans[0] * tokens) / (layers - spans[0])
    if room < 0.5:
        with pytest.raises(BudgetError, match=rf"a mean of {granted} of {tokens + fixed} visual tokens per layer"):
            left_by_stages(tokens, keys, granted, fixed, tokens + fixed, tuple(spans))
        return
    left = list(left_by_stages(tokens, keys, granted, fixed, tokens + fixed, tuple(spans)))
    assert left == sorted(left, reverse=True)
    assert 1 <= left[-1] <= left[0] <= tokens
    seen = spans[0] * tokens + sum(n * count for n, count in zip(spans[1:], left, strict=True))
    if granted == tokens + fixed:
        assert left == [tokens] * len(left)
    else:
        assert left[-1] >= min(keys, tokens) or room < keys
        assert abs(seen - total) <= (layers - spans[0]) / 2 + 1e-6  # at most half a token per layer


def test_published_means() -> None:
    """LLaVA-1.5-7B with 576 tokens: 3 layers see all of them, or 2 in the official count."""
    method, official = vtc.create("mustdrop"), vtc.create("mustdrop", average="official")
    assert (method.spans(LLAVA), official.spans(LLAVA)) == ([3, 4, 4, 4, 17], [2, 4, 4, 4, 18])  # type: ignore[attr-defined]
    for mean in (192, 128):
        for spans in ([3, 4, 4, 4, 17], [2, 4, 4, 4, 18]):
            left = left_by_stages(576, 47, mean, 0, 576, tuple(spans))
            assert abs(sum(n * c for n, c in zip(spans, [576, *left], strict=True)) / 32 - mean) <= 0.5


# --- what it is
def test_defaults_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("mustdrop")) == {
        "merge": "threshold", "window": (3, 3), "tau": 0.8, "retain": None, "keep_raster_order": None,
        "filter": "budget", "key_rate": 0.08, "layers": (2, 6, 10, 14), "depth": 32, "gamma": 0.001, "alpha": 0.001,
        "cache": True, "average": "true",
    }  # fmt: skip
    refused: list[tuple[dict[str, Any], str]] = [
        ({"merge": "off", "filter": "off", "cache": False}, "all off, so nothing would happen"),
        ({"merge": "on"}, "unknown merge 'on'"),
        ({"filter": "threshhold"}, "did you mean 'threshold'"),
        ({"average": "mean"}, "unknown average 'mean'"),
        ({"window": (1, 1)}, r"window=\(1, 1\) holds nothing to merge; pass \(rows, columns\)"),
        (
            {"window": (3,)},
            r"window=\(3,\) of 'mustdrop' is not a tuple of 2 whole numbers; write for example window=\(3, 3\)",
        ),
        ({"tau": 1.5}, "tau=1.5 is no mean cosine"),
        ({"retain": 64}, "retain=64 is the tokens left per tile for merge='count'"),
        ({"merge": "count", "retain": 0}, "retain=0 is"),
        ({"merge": "count"}, "the budget cannot fix both steps; pass retain="),
        ({"key_rate": 8}, "key_rate=8.0 is no share"),
        ({"layers": ()}, "are no ascending layer numbers"),
        ({"layers": (6, 2)}, r"layers=\(6, 2\) are no ascending"),
        ({"layers": (2, 40)}, r"layers=\(2, 40\) exceed depth=32"),
        ({"gamma": 0.0}, "gamma=0.0 and alpha=0.001 have to be positive"),
    ]
    for options, message in refused:
        with pytest.raises(VTCError, match=message):
            vtc.create("mustdrop", **options)
    assert hash(vtc.create("mustdrop", layers=[2, 6])) == hash(vtc.create("mustdrop", layers=(2, 6)))


def test_when_a_budget_is_needed() -> None:
    assert vtc.create("mustdrop").needs_budget
    assert vtc.create("mustdrop", merge="count", filter="off").needs_budget
    for options in ({"filter": "threshold"}, {"filter": "off"}, {"merge": "off", "filter": "off"}):
        assert not vtc.create("mustdrop", **options).needs_budget
    assert not vtc.create("mustdrop", merge="count", retain=64, filter="off").needs_budget


def test_plans() -> None:
    inside = (3, 7, 11, 15, CacheStage(2))
    needs = Needs({23: Rows.CLS}, dict.fromkeys((2, 6, 10, 14), TEXT))
    assert vtc.create("mustdrop").plan(LLAVA) == vtc.Plan((EncoderStage(1), *inside), needs, "compact")
    assert vtc.create("mustdrop").plan(NEXT).stages == (EncoderStage(1), *inside)
    assert vtc.create("mustdrop").plan(SIGLIP).needs.vision == {26: Rows.RECEIVED}
    intern = vtc.create("mustdrop").plan(INTERN)
    assert (intern.stages, intern.needs.vision) == ((0, 3, 6, 10, 13, CacheStage(2)), {23: Rows.CLS})
    qwen = vtc.create("mustdrop").plan(QWEN)
    assert (qwen.stages, qwen.positions) == ((0, 3, 8, 12, 17, CacheStage(2)), "preserve")
    assert qwen.needs.vision == {31: Rows.RECEIVED}
    assert vtc.create("mustdrop", layers=(2, 30), depth=None).plan(QWEN).stages[1:3] == (3, 31)
    assert vtc.create("mustdrop", key_rate=0).plan(LLAVA).needs.vision == {}
    alone = vtc.create("mustdrop", merge="off", filter="off").plan(LLAVA)
    assert alone == vtc.Plan((CacheStage(2),), Needs(), "compact")
    assert vtc.create("mustdrop", filter="off", cache=False).plan(LLAVA).stages == (EncoderStage(1),)
    assert vtc.create("mustdrop", merge="off", cache=False).plan(LLAVA).stages == (3, 7, 11, 15)


def test_models_it_cannot_serve() -> None:
    with pytest.raises(UnsupportedMethod, match="leave nothing to prune in the 32 layers of this llava model"):
        vtc.create("mustdrop", layers=(31,)).plan(LLAVA)
    for model in (NEXT, INTERN, QWEN):
        with pytest.raises(UnsupportedMethod, match="keep_raster_order=False puts merged tokens in front"):
            vtc.create("mustdrop", keep_raster_order=False).plan(model)
    assert vtc.create("mustdrop", keep_raster_order=True).plan(NEXT)


# --- step 1, one window at a time
def plain_merge(layout: Any, rows: Tensor, tau: float | None, count: int, window: tuple[int, int], front: bool) -> Any:
    """Token number, row and members of every token that is left, in order."""
    real = [j for j in range(layout.n_tokens) if not layout.newline[j]]
    whole: list[tuple[float, list[int]]] = []
    first = 0
    for frames, height, width in layout.regions:
        for frame in range(frames):
            for top in range(0, height - window[0] + 1, window[0]):
                for left in range(0, width - window[1] + 1, window[1]):
                    places = [
                        first + (frame * height + top + i) * width + left + j
                        for i in range(window[0])
                        for j in range(window[1])
                    ]
                    unit = [rows[p].double() / rows[p].double().norm().clamp(min=1e-8) for p in places]
                    pairs = [float(u @ v) for a, u in enumerate(unit) for b, v in enumerate(unit) if a != b]
                    whole.append((sum(pairs) / len(pairs), places))
        first += frames * height * width
    whole.sort(key=lambda each: -each[0])
    merged = [
        places for rank, (value, places) in enumerate(whole) if rank < count or (tau is not None and value >= tau)
    ]
    taken = {place for places in merged for place in places}
    groups = [*merged, *([place] for place in range(len(real)) if place not in taken)]
    order = sorted(groups, key=lambda places: places[0])
    numbers = [real[places[0]] for places in order]
    order = groups if front else order
    return numbers, [rows[places].mean(0) for places in order], [[real[p] for p in places] for places in order]


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"tau": 0.3}, INTERN),
        ({"tau": 0.3}, FRONT),
        ({"tau": 0.3, "keep_raster_order": True}, FRONT),
        ({"window": (2, 3), "tau": 0.1}, INTERN),
        ({"window": (1, 2), "merge": "count", "retain": 10}, INTERN),
        ({"window": (2, 2), "merge": "count", "retain": 9}, FRONT),
        ({"merge": "count", "retain": 1}, FRONT),
    ],
    ids=str,
)
def test_the_plain_merge(make_view: Any, kept: Any, shape: Any, options: Any, spec: Any) -> None:
    shapes = [(7, 9), (24, 24), (1, 1), (2, 3), (6, 6)]
    if not spec.single_crop:
        shapes += [shape(((1, 3, 3), (1, 5, 7)), newlines=True), shape(((4, 5, 6),))]
    view = make_view(shapes, spec=spec)
    method: Any = vtc.create("mustdrop", filter="off", **options)
    mixed = view.hidden + torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(1)) * 2
    view = dataclasses.replace(view, states=States(mixed))
    selection = method.select(view)
    numbers = kept(view, selection)
    front = method.keep_raster_order is None and spec.single_crop
    merged = 0
    for item, layout in enumerate(view.items.layouts):
        rows = view.tokens[item][view.items.mask[item]]
        goal, saved = (method.retain or 0) * layout.n_crops, math.prod(method.window) - 1
        count = -(-(len(rows) - goal) // saved) if method.merge == "count" else 0
        tau = method.tau if method.merge == "threshold" else None
        expected, values, members = plain_merge(layout, rows, tau, count, method.window, front)
        assert numbers[item] == expected
        left = selection.keep[item] & view.items.mask[item]
        assert torch.allclose(selection.tokens[item][left], torch.stack(values), atol=1e-5)
        token = view.items.token[item]
        for slot, group in zip(token[left].tolist(), members, strict=True):
            for place, j in enumerate(token.tolist()):
                if view.items.mask[item, place] and j in group and (len(group) > 1 or front):
                    assert int(token[selection.merged_into[item, place]]) == slot
        merged += sum(len(group) > 1 for group in members)
    assert merged > 2


def test_a_window_of_exactly_tau_merges(make_view: Any, kept: Any) -> None:
    """Equal tokens have a mean cosine of one; in the second item one token of one window differs."""
    view = make_view([(3, 6), (3, 6)], spec=QWEN)
    view.hidden[:] = torch.eye(6)[0]
    view.hidden[0, view.items.index[1, 0]] = torch.eye(6)[1]
    selection = vtc.create("mustdrop", merge="threshold", tau=1.0, filter="off").select(view)
    assert [len(numbers) for numbers in kept(view, selection)] == [2, 10]


def test_the_count_of_a_budget(make_view: Any, kept: Any) -> None:
    """r = ceil((N - target) / 8): the published counts 192, 128 and 64 of 576 exactly."""
    for target in (192, 128, 64, 190, 10, 576, 570):
        view = make_view([(24, 24)], spec=FRONT, keep=target)
        left = kept(view, vtc.create("mustdrop", merge="count", filter="off").select(view))[0]
        assert len(left) == 576 - 8 * min(64, -(-(576 - target) // 8))


def test_more_windows_merge_where_the_key_set_would_exceed_the_budget(make_view: Any, kept: Any) -> None:
    """64 of 576 as a mean over 32 layers: n0 = 384 of them and ceil(0.08 * 384) = 31 from layer 3 on."""
    view = make_view([(24, 24)], vision={23: [torch.rand(576)]}, spec=FRONT, keep=64)
    assert len(kept(view, vtc.create("mustdrop", tau=1.0).select(view))[0]) == 384
    assert len(kept(view, vtc.create("mustdrop", tau=1.0, filter="threshold").select(view))[0]) == 576
    assert 64 - 0.5 <= (3 * 384 + sum(n * c for n, c in zip((4, 4, 4, 17), [31] * 4, strict=True))) / 32 <= 64.5


# --- step 2, one token at a time
def text_rows(view: StageView, seed: int) -> Tensor:
    """[2, B, L] made-up sums and maxima."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.rand(view.visual.shape, generator=generator) ** 3
    return torch.stack([total, total * torch.rand(view.visual.shape, generator=generator)])


def after(view: StageView, selection: Any, stage: int) -> StageView:
    """The view of a later stage in which only the selected tokens are left, at their places."""
    places = torch.arange(view.hidden.shape[1]).expand(view.hidden.shape[:2])
    counts = (selection.keep & view.items.mask).sum(1).tolist()
    return dataclasses.replace(view, stage=stage, items=view.items.kept(selection.keep, counts, places))


@pytest.mark.parametrize("options", [{}, {"filter": "threshold", "gamma": 0.02, "alpha": 0.5}], ids=str)
@pytest.mark.parametrize("key_rate", [0.08, 0.0, 0.3])
def test_the_plain_filter(make_view: Any, kept: Any, shape: Any, options: Any, key_rate: float) -> None:
    shapes = [(7, 9), shape(((1, 3, 3), (2, 4, 7)), newlines=True), (1, 1), (12, 12)]
    counts = [63, 9 + 2 * 4 * 8, 1, 144]
    generator = torch.Generator().manual_seed(3)
    vision = {23: [torch.rand(count, generator=generator) for count in counts]}
    budget = {} if options else {"retention": 0.5}
    view = make_view(shapes, vision=vision, stage=3, **budget)
    stages = (3, 7, 11, 15)
    view = dataclasses.replace(view, llm_rows={(k - 1, TEXT): text_rows(view, k) for k in stages})
    method: Any = vtc.create("mustdrop", key_rate=key_rate, **options)
    left = [view.items.token[i][view.items.mask[i]].tolist() for i in range(4)]
    begin = [len(each) for each in left]
    keys: list[set[int]] = []
    for i, layout in enumerate(view.items.layouts):
        keys.append(set())
        for crop in range(layout.n_crops):
            own = sorted((j for j in left[i] if layout.crop[j] == crop), key=lambda j: -float(vision[23][i][j]))
            keys[i] |= set(own[: math.ceil(key_rate * len(own))])
    history = [begin]
    for stage in stages:
        selection = method.select(view)
        found = kept(view, selection)
        total, peak = view.llm_rows[stage - 1, TEXT]
        for i in range(4):
            row = int(view.items.row[i])
            there = view.items.mask[i]
            places = dict(zip(left[i], view.items.index[i][there].tolist(), strict=True))
            g = {j: float(total[row, p]) for j, p in places.items()}
            m = {j: float(peak[row, p]) for j, p in places.items()}
            whole = sum(g.values())
            if options:
                keep = {j for j in left[i] if g[j] >= method.gamma * whole or m[j] >= method.alpha} | keys[i]
            else:
                u = {j: max(g[j] / (method.gamma * whole), m[j] / method.alpha) for j in left[i]}
                ranked = sorted(left[i], key=lambda j: (j not in keys[i], -u[j], j))
                keep = set(ranked[: len(found[i])])
            assert found[i] == sorted(keep)
            assert keys[i] <= keep
        left = found
        history.append([len(each) for each in left])
        view = after(view, selection, stages[(stages.index(stage) + 1) % 4])
    if not options:
        for i, fixed in enumerate(view.items.fixed):
            mean = sum(n * counts[i] for n, counts in zip((3, 4, 4, 4, 17), history, strict=True)) / 32
            assert abs(mean + fixed - view.granted[i]) <= 0.5
    assert history[-1][0] < begin[0] // 2


def test_a_prompt_without_text_behind_the_image(make_view: Any, kept: Any) -> None:
    view = make_view([(4, 4)], vision={23: [torch.rand(16)]}, stage=3, keep=6)
    view = dataclasses.replace(view, llm_rows={(2, TEXT): torch.zeros(2, *view.visual.shape)})
    assert kept(view, vtc.create("mustdrop", filter="threshold").select(view))[0] == list(range(16))
    found = kept(view, vtc.create("mustdrop", key_rate=0).select(view))[0]
    assert found == list(range(len(found)))


def test_budgets_that_cannot_be_met(make_view: Any) -> None:
    view = make_view([(24, 24)], vision={23: [torch.rand(576)]}, stage=3, keep=50)
    view = dataclasses.replace(view, llm_rows={(2, TEXT): text_rows(view, 0)})
    with pytest.raises(BudgetError, match=r"a mean of 50 of 576 .* 3 of 32 LLM layers see 576 tokens .* least 55 "):
        vtc.create("mustdrop", merge="off").select(view)
    least = dataclasses.replace(view, budget=vtc.Budget(keep=55))
    assert vtc.create("mustdrop", merge="off").select(least).counts == [2]  # then 1, 1, 1


# --- on models
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("retention", [0.4, 0.5, 0.75])
@pytest.mark.parametrize("options", [{}, {"merge": "off"}, {"tau": 0.2, "window": (2, 2)}], ids=str)
def test_the_mean_over_the_layers_meets_the_request(name: str, retention: float, options: Any) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 5], [2, kind, 12], [9]], model=model)
        with torch.no_grad(), vtc.compress(model, "mustdrop", retention=retention, key_rate=0.01, **options) as handle:
            model(**inputs)
        call = handle.stats.calls[0]
        spans = vtc.create("mustdrop").spans(vtc.adapters.of(model).spec)  # type: ignore[attr-defined]
        for row in range(2):
            entered = len(handle.trace[0].items[row].kept.get(0, range(call.visual_tokens_in[row])))
            most = [entered] * len(spans)
            reachable = sum(n * c for n, c in zip(spans, most, strict=True)) / sum(spans)
            goal = min(reachable, vtc.tokens_to_keep(call.visual_tokens_in[row], retention))
            assert abs(call.visual_tokens_kept[row] - goal) <= 1


def encoded(model: Any, pixels: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Projected features of one merged image, in official order, and the class row of the last encoder layer."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    states, row = [], torch.empty(0)
    for number, layer in enumerate(tower.encoder.layers):
        states.append(hidden)
        if number == len(tower.encoder.layers) - 1:
            normed, attention = layer.layer_norm1(hidden), layer.self_attn
            heads = attention.num_heads
            q, k = (
                p(normed)[0].unflatten(-1, (heads, -1)).transpose(0, 1) for p in (attention.q_proj, attention.k_proj)
            )
            row = (q[:, 0:1] @ k.transpose(1, 2) * attention.scale).softmax(-1).mean(0)[0, 1:]
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if number == 0:
            patches = hidden[0, 1:]
            layout = type("Layout", (), {})()
            layout.n_tokens, layout.newline, layout.regions = 16, torch.zeros(16), ((1, 4, 4),)
            _, values, _ = plain_merge(layout, patches, tau, 0, (2, 2), True)
            hidden = torch.cat([hidden[:, :1], torch.stack(values)[None]], dim=1)
    return model.model.multi_modal_projector(states[-1][:, 1:])[0], row


@pytest.mark.parametrize("tau", [0.05, 0.2])
def test_merging_inside_the_encoder(clip: Any, limits: Any, tau: float) -> None:
    """The LLM sees the official sequence, and the key set is that of the shorter sequence's class row."""
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    seen: list[Tensor] = []
    clip.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    options = {"tau": tau, "window": (2, 2), "filter": "threshold", "gamma": 9.0, "alpha": 9.0, "key_rate": 0.3}
    with torch.no_grad(), vtc.compress(clip, "mustdrop", **options) as handle:
        clip(**inputs)
    with torch.no_grad():
        features, row = encoded(clip, inputs["pixel_values"], tau)
    assert 4 <= len(features) < 16
    assert torch.allclose(seen[0][0, 3:-5], features, atol=limits.hidden)
    item = handle.trace[0].items[0]
    places = item.kept[0]
    keys = row.topk(math.ceil(0.3 * len(features))).indices.sort().values
    assert torch.equal(item.kept[1], places[keys])  # nothing but the key set passes such thresholds
    assert torch.equal(item.kept[3], places[keys])
    assert handle.stats.calls[0].layer_rows == (8 + len(features), *[8 + len(keys)] * 3)


def test_images_decide_for_themselves(clip: Any) -> None:
    """No minimum over the batch: a uniform image merges whatever lies beside it."""
    inputs = tiny_inputs("llava-clip", [[3, "image", 5], [3, "image", 5]])
    inputs["pixel_values"][1] = 1.0
    with torch.no_grad(), vtc.compress(clip, "mustdrop", filter="off", tau=0.5) as handle:
        clip(**inputs)
        clip(**{k: v[:1] for k, v in inputs.items()})
        clip(**{k: v[1:] for k, v in inputs.items()})
    both, first, second = ([len(item.kept[0]) for item in record.items] for record in handle.trace)
    assert both == [*first, *second]


@pytest.mark.parametrize("name", ["llava-clip", "internvl", "qwen2.5-vl"])
def test_text_attention_is_that_of_eager_attention(name: str) -> None:
    inputs = tiny_inputs(name, LAYOUT, seed=2)
    eager = tiny_model(name, attn_implementation="eager")
    with torch.no_grad():
        rows = eager(**inputs, output_attentions=True).attentions[0].mean(1)
    read: list[Tensor] = []

    class Spy(vtc.methods.mustdrop.method.MustDrop):  # type: ignore[misc, name-defined]
        def attention(self, view: StageView, layer: int) -> Tensor:
            read.append(view.llm_rows[layer, TEXT])
            return super().attention(view, layer)

    model = tiny_model(name)
    with torch.no_grad(), vtc.compress(model, Spy(merge="off", filter="threshold"), positions="preserve"):
        model(**inputs)
    ids = inputs["input_ids"]
    visual = sum((ids == token) for token in vtc.adapters.of(model).placeholders.values()) > 0
    text = inputs["attention_mask"].bool() & ~visual & (visual.cumsum(1) > 0)
    for row in range(2):
        chosen = rows[row][text[row]]
        assert torch.allclose(read[0][:, row], torch.stack([chosen.sum(0), chosen.amax(0)]), atol=1e-5)


@pytest.mark.parametrize("layers", [(0,), (1, 2)])
def test_the_cache_holds_what_is_alive_at_the_end(clip: Any, layers: tuple[int, ...]) -> None:
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    with torch.no_grad(), vtc.compress(clip, "mustdrop", keep=11, layers=layers, depth=None, merge="off") as handle:
        clip(**inputs)
    call = handle.stats.calls[0]
    left = call.layer_rows[-1]
    assert call.kv_rows == (24,) * layers[0] + (left,) * (4 - layers[0])
    assert call.layer_rows[layers[0]] == 24 > left


def test_steps_compose_with_other_methods(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    cache = vtc.create("mustdrop", merge="off", filter="off", layers=(1,), depth=None)
    with torch.no_grad(), vtc.compress(clip, ["fastv", cache], retention=[0.6, None]) as handle:
        clip.generate(**inputs, max_new_tokens=3, do_sample=False)
    call = handle.stats.calls[0]
    assert call.kv_rows == (24, *[call.layer_rows[-1]] * 3)
    assert call.layer_rows[-1] < 24
    merge = vtc.create("mustdrop", filter="off", cache=False, tau=-1, window=(2, 2))
    with torch.no_grad(), vtc.compress(clip, [merge, "vtc_cls"], retention=[None, 0.5]) as handle:
        clip.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert handle.stats.calls[0].layer_rows == (10,) * 4  # 16 -> 4 -> 2 tokens


def test_pairs_of_thresholds_matter(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    counts = []
    for gamma, alpha in [(0.01, 0.001), (0.05, 0.05), (0.2, 0.4)]:
        with torch.no_grad(), vtc.compress(clip, "mustdrop", filter="threshold", gamma=gamma, alpha=alpha) as handle:
            clip(**inputs)
        counts.append(handle.stats.calls[0].layer_rows[-1])
    assert counts == sorted(set(counts), reverse=True)


def test_a_retention_out_of_reach_is_refused_on_attaching() -> None:
    """Without merging the layers in front of the first filter see every token, whatever the cache drops later."""
    model = tiny_model("llava-clip")
    layers = len(model.model.language_model.layers)
    method = vtc.create("mustdrop", merge="off", layers=(0,), depth=None)
    with pytest.raises(BudgetError, match=rf"'mustdrop' here: 1 of {layers} LLM layers see every token"):
        vtc.compress(model, method, retention=0.9 / layers)
    with pytest.raises(BudgetError, match="'mustdrop' here"):
        vtc.compress(model, ["random", method], retention=[0.5, 0.9 / layers])
    vtc.compress(model, method, retention=1.2 / layers).detach()
    early = vtc.create("mustdrop", merge="off", layers=(0,), depth=None, average="official")
    vtc.compress(model, early, retention=0.9 / layers).detach()
    vtc.compress(model, vtc.create("mustdrop", layers=(0,), depth=None), retention=0.9 / layers).detach()


@pytest.mark.parametrize("first", ["random", "vtc_cls"])
def test_the_filter_runs_behind_a_method_that_drops_tokens_in_front_of_the_llm(first: str) -> None:
    """Tokens keep their numbers among all the image had, however few reach the filter."""
    model = tiny_model("llava-clip")
    method = vtc.create("mustdrop", merge="off", layers=(0,), depth=None)
    with vtc.compress(model, [first, method], retention=[0.5, 0.7]) as handle:
        model.generate(**tiny_inputs("llava-clip", LAYOUT, seed=1, model=model), max_new_tokens=2)
    assert 0.5 * 0.6 < handle.stats.retention < 0.5 * 0.8
