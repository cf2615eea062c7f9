"""ToDRE against the paper's equations, one token at a time, and against the model's own eager attention."""

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
from vtc import adapters
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.methods.todre import parted, shares
from vtc.ops.greedy import best, chosen, greedy_map, k_center, max_sum, most_isolated
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain.greedy import (
    plain_greedy_map,
    plain_k_center,
    plain_max_sum,
    plain_most_isolated,
)

SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
INTERN = ModelSpec("internvl", 24, 23, True, tuple(range(24)), 28)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
VICUNA_13B = ModelSpec("llava", 24, 22, True, tuple(range(24)), 40)
CLIP = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
SHAPES = [(7, 9), (24, 24), (1, 1), (2, 3), (3, 3)]
AXES = st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]))  # exact cosines, so exact ties


# --- the walks, on ties, masks and budgets beyond the item
@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    items, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    features = torch.zeros(items, length, 4)
    for item in range(items):
        for token in range(length):
            axis, value = draw(AXES)
            features[item, token, axis] = value
    marks = draw(st.lists(st.booleans(), min_size=items * length, max_size=items * length))
    mask = torch.tensor(marks).view(items, length)
    mask[:, draw(st.integers(0, length - 1))] = True
    return {"features": features, "mask": mask, "steps": draw(st.integers(1, length + 2))}


def same_orders(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    for ours, theirs, real in zip(found.tolist(), expected.tolist(), mask.sum(1).tolist(), strict=True):
        assert ours[:real] == theirs[:real]


@given(scenes())
def test_walks_break_ties_by_the_lower_index(scene: dict[str, Any]) -> None:
    scene["start"] = best(torch.rand(scene["mask"].shape), scene["mask"])
    for walk, plain in ((max_sum, plain_max_sum), (k_center, plain_k_center)):
        order = walk(**scene)
        same_orders(order, plain(**scene), scene["mask"])
        marks = chosen(order, torch.full((len(order),), scene["steps"]), scene["mask"])
        assert marks.sum(1).tolist() == scene["mask"].sum(1).clamp(max=scene["steps"]).tolist()


@given(scenes())
def test_the_isolated_and_the_independent_ones(scene: dict[str, Any]) -> None:
    features, mask = scene["features"], scene["mask"]
    assert most_isolated(features, mask).tolist() == plain_most_isolated(features, mask).tolist()
    quality = 1 + torch.arange(mask.shape[1]).flip(0).expand(mask.shape) // 2 * 0.25
    order = greedy_map(features, quality, scene["steps"], mask)
    same_orders(order, plain_greedy_map(features, quality, scene["steps"], mask), mask)


@pytest.mark.parametrize("walk", [max_sum, k_center])
def test_fewer_steps_are_the_beginning_of_more(walk: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    features, mask = torch.randn(3, 63, 17, generator=generator), torch.rand(3, 63, generator=generator) > 0.2
    mask[:, 5] = True
    start = torch.full((3,), 5)
    order = walk(features, start, 30, mask)
    for fewer in (1, 2, 29):
        assert torch.equal(walk(features, start, fewer, mask), order[:, :fewer])
    for item in range(3):  # alone, and scaled token by token: only the direction counts
        scale = torch.rand(1, 63, 1, generator=generator) + 0.1
        alone = walk(features[item : item + 1] * scale, start[:1], 30, mask[item : item + 1])
        assert torch.equal(alone[0], order[item])


def test_broken_features_do_not_break_the_count() -> None:
    features = torch.randn(1, 20, 8)
    features[0, 3:6], features[0, 7], features[0, 9] = math.nan, math.inf, 0.0
    mask = torch.ones(1, 20, dtype=torch.bool)
    for walk in (max_sum, k_center):
        assert sorted(walk(features, torch.tensor([3]), 20, mask)[0].tolist()) == list(range(20))
    assert sorted(greedy_map(features, torch.ones(1, 20), 20, mask)[0].tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("width", "code", "limit"),
    [
        (3584, "max_sum(x, torch.tensor([3]), 3, mask)", 2 * 2**30),  # a float32 copy is 1.3 GiB
        (1024, "cosine_to_mean(x, mask)", 2**28),  # where one would be 390 MiB
    ],
)
def test_a_long_video_fits_into_memory(peak_memory: Any, width: int, code: str, limit: int) -> None:
    setup = (
        "from vtc.ops.similarity import cosine_to_mean\nfrom vtc.ops.greedy import max_sum\n"
        f"x = torch.randn(1, 1000, {width}).bfloat16().repeat(1, 100, 1)\n"
        "mask = torch.ones(1, 100000, dtype=torch.bool)"
    )
    assert peak_memory(setup, code) < limit


# --- stage 1
def plain_stage_1(x: Tensor, attention: list[float] | None, variant: str, pivot: str, keep: int) -> list[int]:
    """Pivot and greedy walk on tokens x [n, D]; attention: of the tokens that may be the pivot, -1 elsewhere."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    if attention is None:
        mean = x.double().mean(0)
        attention = (unit @ (mean / mean.norm())).tolist()
    sign = -1 if pivot == "farthest" else 1
    taken = [max(range(len(x)), key=lambda v: (sign * attention[v], -v))]
    cosine = (unit @ unit.T).tolist()
    over = sum if variant == "max_sum" else max
    while len(taken) < keep:
        free = [v for v in range(len(x)) if v not in taken]
        taken.append(min(free, key=lambda v: (over([cosine[v][c] for c in taken]), v)))
    return sorted(taken)


@pytest.mark.parametrize("variant", ["max_sum", "k_center"])
@pytest.mark.parametrize("pivot", ["cls", "center", "farthest"])
@pytest.mark.parametrize("budget", [{"keep": 1}, {"retention": 0.1}, {"keep": 40}], ids=str)
def test_the_plain_choice(make_view: Any, kept: Any, variant: Any, pivot: Any, budget: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.rand(height * width, generator=generator) for height, width in SHAPES]
    decoys = [torch.rand_like(row) for row in rows]
    vision = {(23, Rows.CLS_PATCHES): rows, (22, Rows.CLS_PATCHES): decoys, (23, Rows.CLS): decoys}
    view = make_view(SHAPES, vision=vision, **budget)
    method = vtc.create("todre", variant=variant, pivot=pivot)
    found = kept(view, method.select(view))
    for item, numbers in enumerate(found):
        x = view.tokens[item, : view.items.counts[item]]
        attention = rows[item].tolist() if pivot == "cls" else None
        assert numbers == plain_stage_1(x, attention, variant, pivot, view.keep[item])


@pytest.mark.parametrize("keep", [5, 14])  # one and ten of the first image, which has four newlines
def test_all_crops_and_frames_share_one_budget(make_view: Any, kept: Any, shape: Any, keep: int) -> None:
    """And the pivot of an image with an overview is one of the overview's tokens."""
    shapes = [shape(((1, 3, 3), (2, 2, 7)), newlines=True), shape(((4, 5, 5),)), shape(((1, 3, 3), (2, 4, 4)))]
    vision = {(23, Rows.CLS_PATCHES): [torch.arange(float(s.item().n_tokens)) for s in shapes]}
    view = make_view(shapes, vision=vision, keep=keep)
    first, video, last = view.items.layouts
    layouts = (dataclasses.replace(first, thumbnail=0), video, dataclasses.replace(last, thumbnail=2))
    view = dataclasses.replace(view, items=dataclasses.replace(view.items, layouts=layouts))
    found = kept(view, vtc.create("todre").select(view))
    for item, (layout, highest) in enumerate(zip(layouts, (8, 99, 40), strict=True)):
        attention = [float(v == highest) for v in range(view.items.counts[item])]
        x = view.tokens[item, : view.items.counts[item]]
        places = plain_stage_1(x, attention, "max_sum", "cls", view.keep[item])
        assert found[item] == [view.items.token[item, place].item() for place in places]
        assert len(found[item]) == keep - layout.newlines


def test_an_overview_of_which_nothing_is_left(make_view: Any, kept: Any) -> None:
    view = make_view([(3, 3)], vision={(23, Rows.CLS_PATCHES): [torch.arange(9.0)]}, keep=1)
    layouts = (dataclasses.replace(view.items.layouts[0], thumbnail=1),)
    view = dataclasses.replace(view, items=dataclasses.replace(view.items, layouts=layouts))
    assert kept(view, vtc.create("todre").select(view)) == [[8]]


def test_random_pivots_depend_on_seed_and_pixels(make_view: Any, kept: Any) -> None:
    draw = lambda seed, pixels: kept(  # noqa: E731
        view := make_view([(9, 9), (9, 9)], seed=pixels, keep=1),
        vtc.create("todre", pivot="random", seed=seed).select(view),
    )
    assert draw(0, 0) == draw(0, 0)
    assert len({str(draw(seed, pixels)) for seed in range(3) for pixels in range(3)}) == 9
    assert draw(0, 0)[0] != draw(0, 0)[1]


# --- stage 2
def plain_shares(attention: Tensor, kinds: list[int]) -> tuple[float, float]:
    """alpha_tv and alpha_vt of one row: attention [H, L, L], kinds 0 system, 1 visual, 2 text, -1 padding."""
    mean = attention.double().mean(0).tolist()
    text, visual = [i for i, k in enumerate(kinds) if k == 2], [i for i, k in enumerate(kinds) if k == 1]
    there = [i for i, k in enumerate(kinds) if k >= 0]
    share = lambda rows, columns: (  # noqa: E731
        sum(mean[i][j] for i in rows for j in columns) / sum(mean[i][j] for i in rows for j in there)
    )
    return share(text, visual), share(visual, text)


def test_both_shares_have_to_be_small() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]).bool()
    text = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    sums = torch.zeros(2, 4, 5)
    sums[0, 0, 1:3], sums[0, 1, 1:3], sums[0, 3, 1] = 0.05, 0.15, 0.1
    sums[1, 1, 3] = 0.1
    to_visual, to_text = shares(sums, visual, text)
    assert torch.allclose(to_visual, torch.tensor([0.05, 0.15, 0.0, 0.1]))
    assert torch.allclose(to_text, torch.tensor([0.0, 0.05, 0.0, 0.0]))
    decide = lambda tau: parted(sums, visual, text, tau).tolist()  # noqa: E731
    assert decide(0.06) == [True, False, False, False]  # row 2 has no text
    assert decide(0.1) == [True, False, False, False]  # strict
    assert decide(0.16) == [True, True, False, True]


@pytest.mark.parametrize("which", [0, 1])
def test_a_share_of_exactly_tau_is_not_below_it(which: int) -> None:
    visual, text = torch.tensor([[True, True, False, False]]), torch.tensor([[False, False, True, True]])
    sums = torch.zeros(2, 1, 4)
    sums[which, 0, [0, 1] if which == 0 else [2, 3]] = 0.25  # of two rows: a share of a quarter
    assert [parted(sums, visual, text, tau).item() for tau in (0.2, 0.25, 0.3)] == [False, False, True]


def test_a_row_loses_all_or_nothing(make_view: Any, shape: Any) -> None:
    shapes = [shape(((1, 2, 2),), newlines=True), (2, 3), (3, 3)]
    first = make_view(shapes)
    sums = torch.zeros(2, *first.hidden.shape[:2])
    sums[0, 0] = 0.5  # the first row's text looks at its items
    key = (28, Rows.GROUP_SUMS)
    method = vtc.create("todre", diversity=False)
    for values, stays in ((sums, [True, True, False]), (sums.flip(1), [False, False, True]), (sums * 0, [False] * 3)):
        view = make_view(shapes, stage=29, llm={key: values})
        selection = method.select(view)
        assert selection.counts is None
        assert selection.keep.any(1).tolist() == stays
        assert torch.equal(selection.keep, view.items.mask & torch.tensor(stays)[:, None])
        assert selection.separators.sum(1).tolist() == [2 * stays[0], 0, 0]
    empty = dataclasses.replace(first.items, counts=(0, 0, 0), fixed=(0, 0, 0))
    assert method.select(dataclasses.replace(first, stage=29, items=empty)) is None


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_part_where_eager_attention_says_so(layer: int) -> None:
    layout: Any = [[3, "image", 5, "image", 4], [2, "image", 12], [9]]
    inputs = tiny_inputs("llava-clip", layout, seed=2, extra=1)
    image = tiny_model("llava-clip").config.image_token_id
    eager = tiny_model("llava-clip", attn_implementation="eager")
    with torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions[layer]
    measured = []
    for row in range(2):
        ids, there = inputs["input_ids"][row].tolist(), inputs["attention_mask"][row].tolist()
        kinds = [-1 if not t else 1 if i == image else 2 for i, t in zip(ids, there, strict=True)]
        measured.append(max(plain_shares(attention[row], kinds)))
    assert abs(measured[0] - measured[1]) > 1e-3
    taus = {sum(measured) / 2: [m < sum(measured) / 2 for m in measured], 1.0: [True] * 2, 1e-6: [False] * 2}
    for tau, expected in taus.items():
        model = tiny_model("llava-clip")
        method = vtc.create("todre", diversity=False, check_layers=[layer], tau=tau)
        with vtc.compress(model, method) as handle, torch.no_grad():
            model(**inputs)
        items = handle.trace[0].items
        assert [len(item.kept[layer + 1]) for item in items] == [0 if expected[item.row] else 16 for item in items]
        mean = [(layer + 1) / 4 if gone else 1 for gone in expected]
        counts = handle.stats.calls[0].visual_tokens_kept
        assert counts == pytest.approx((32 * mean[0], 16 * mean[1], 0))


def test_the_first_of_several_layers_wins() -> None:
    inputs = tiny_inputs("llava-next", [[3, "image", 5], [2, "image", 9]])
    kept = []
    for layers in ([0, 2], [0], [2], [0.25, 0.5], [0.99]):
        model = tiny_model("llava-next")
        with vtc.compress(model, "todre", tau=1.0, check_layers=layers, diversity=False) as handle:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        kept.append(handle.stats.retention)
        assert handle.stats.calls[0].stages[-1].visual_tokens_out == 0  # separators too
    assert kept == pytest.approx([0.25, 0.25, 0.75, 0.5, 0.75])


# --- plans
@pytest.mark.parametrize(
    ("options", "spec", "stages", "vision", "llm"),
    [
        ({}, CLIP, (0, 29), {23: Rows.CLS_PATCHES}, (28,)),
        ({}, VICUNA_13B, (0, 36), {23: Rows.CLS_PATCHES}, (35,)),
        ({}, INTERN, (0, 25), {23: Rows.CLS_PATCHES}, (24,)),
        ({}, SIGLIP, (0, 29), {}, (28,)),
        ({}, QWEN, (0, 32), {}, (31,)),
        ({"pivot_layer": 22}, CLIP, (0, 29), {22: Rows.CLS_PATCHES}, (28,)),
        ({"pivot": "random"}, CLIP, (0, 29), {}, (28,)),
        ({"check_layers": (0.5, 0.75, 3, 16)}, CLIP, (0, 4, 17, 25), {23: Rows.CLS_PATCHES}, (3, 16, 24)),
        ({"check_layers": (0.999, 30)}, CLIP, (0, 31), {23: Rows.CLS_PATCHES}, (30,)),
        ({"relevance": False}, CLIP, (0,), {23: Rows.CLS_PATCHES}, ()),
        ({"diversity": False}, CLIP, (29,), {}, (28,)),
    ],
)
def test_plans(options: Any, spec: ModelSpec, stages: Any, vision: Any, llm: Any) -> None:
    method = vtc.create("todre", **options)
    plan = method.plan(spec)
    assert plan.stages == stages
    assert plan.needs.vision_pairs == Needs(vision=vision).vision_pairs
    assert plan.needs.llm_pairs == Needs(llm=dict.fromkeys(llm, Rows.GROUP_SUMS)).llm_pairs
    assert plan.positions == ("compact_input" if method.diversity and not spec.mrope else "preserve")
    assert method.needs_budget == method.diversity


def test_defaults() -> None:
    method = vtc.create("todre")
    assert (method.variant, method.pivot, method.check_layers, method.tau) == ("max_sum", None, (0.875,), 0.1)
    assert (method.start(CLIP), method.start(SIGLIP), method.start(QWEN)) == ("cls", "center", "center")
    assert vtc.create("todre", check_layers=[0.5]) == vtc.create("todre", check_layers=(0.5,))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"variant": "maxsum"}, "unknown variant 'maxsum'.*max_sum"),
    ({"pivot": "centre"}, "unknown pivot 'centre'.*center"),
    ({"tau": 0}, r"tau=0.0 is no share of attention; pass a value in \(0, 1\], the paper uses 0.1"),
    ({"tau": 1.5}, "tau=1.5 is no share"),
    ({"check_layers": ()}, r"check_layers=\(\) names no layers; write indices .* or turn the second stage off"),
    ({"check_layers": (-1,)}, r"check_layers=\(-1,\) names no layers"),
    ({"check_layers": (1.5,)}, r"check_layers=\(1.5,\) names no layers"),
    ({"check_layers": (True,)}, r"check_layers=\(True,\) of 'todre' is not a tuple of whole numbers or finite numbers"),
    ({"diversity": False, "relevance": False}, "leave nothing to do; turn one of the stages on"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refusals(options: Any, message: str) -> None:
    with pytest.raises(VTCError, match=message):
        vtc.create("todre", **options)


def test_what_a_model_cannot_do(siglip: Any, clip: Any) -> None:
    with pytest.raises(UnsupportedMethod, match=r"pivot='cls' needs a class token, which .* llava model lacks"):
        vtc.compress(siglip, "todre", pivot="cls", keep=4)
    with pytest.raises(UnsupportedMethod, match=r"pivot_layer=4 is not among the encoder layers 0 to 3 of this llava"):
        vtc.compress(clip, "todre", pivot_layer=4, keep=4)
    with pytest.raises(UnsupportedMethod, match=r"check_layers=\(3,\) saves nothing on 4 LLM layers.* among 0 to 2"):
        vtc.compress(clip, "todre", check_layers=(3,), keep=4)
    with pytest.raises(BudgetError, match="'todre' takes no retention or keep"):
        vtc.compress(clip, "todre", diversity=False, keep=4)


# --- on models
def eager_class_row(model: Any, pixels: Tensor) -> Tensor:
    """[crops, N] what the class token pays to the patches in the last layer, softmax over the patches."""
    seen: list[Tensor] = []
    last = adapters.of(model).vision_attention[-1]
    last.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    model.model.get_image_features(pixels, return_dict=True)
    row = seen[0][:, :, 0, 1:]
    return (row / row.sum(-1, keepdim=True)).mean(1)


@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip"])
@pytest.mark.parametrize("variant", ["max_sum", "k_center"])
def test_the_kept_set_is_the_one_computed_by_hand(name: str, variant: str) -> None:
    inputs = tiny_inputs(name, [[3, "image", 5, "image", 2], [2, "image", 9]], seed=4)
    with torch.no_grad():
        features = tiny_model(name).model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        eager = tiny_model(name, attn_implementation="eager")
        rows = eager_class_row(eager, inputs["pixel_values"]) if name == "llava-clip" else None
    model = tiny_model(name)
    with vtc.compress(model, "todre", variant=variant, keep=6) as handle, torch.no_grad():
        model(**inputs)
    for item, record in enumerate(handle.trace[0].items):
        attention = None if rows is None else rows[item].tolist()
        assert record.kept[0].tolist() == plain_stage_1(features[item], attention, variant, "any", 6)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("retention", [0.3, 0.5, 0.8])  # a fifth of a tiny AnyRes image may be newlines
def test_the_budget_is_met_exactly_by_stage_1_and_never_exceeded(name: str, retention: float) -> None:
    model = tiny_model(name)
    kind = TINY_MODELS[name].kinds[-1]
    inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12], [9]], seed=3, model=model)
    used = {}
    for relevance in (False, True):
        with vtc.compress(model, "todre", retention=retention, relevance=relevance, tau=1.0) as handle, torch.no_grad():
            model(**inputs)
        (call,) = handle.stats.calls
        granted = [0.0] * 3
        for item in handle.trace[0].items:
            granted[item.row] += vtc.tokens_to_keep(len(item.positions), retention)
        used[relevance] = call.visual_tokens_kept
        if not relevance:
            for kept, asked in zip(call.visual_tokens_kept, granted, strict=True):
                assert abs(kept - asked) <= max(1, 0.01 * asked)
    assert used[True] == pytest.approx([0.75 * value for value in used[False]])  # everything left behind layer 2


def test_a_small_image_meets_stage_2_alone_and_in_a_batch() -> None:
    """An absolute budget that it does not fill leaves its tokens, not its LLM layers, untouched."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[2, "image", 9]])
    for budget, mean in (({"keep": 999}, 12.0), ({"retention": 0.99}, 12.0), ({"retention": 1.0}, 16.0)):
        with vtc.compress(model, "todre", tau=1.0, **budget) as handle, torch.no_grad():
            model(**inputs)
        assert handle.stats.visual_tokens_kept == mean
    with vtc.compress(model, "todre", relevance=False, keep=999) as handle, torch.no_grad():
        model(**inputs)
    assert handle.stats.visual_tokens_kept == 16.0
