"""HiPrune against a plain transcription of its rules, and against the model's own eager attention."""

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
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Rows
from vtc.method.groups import Parts
from vtc.methods.hiprune.method import anchors_of
from vtc.methods.hiprune.neighbours import hierarchical, neighbours, tile_places
from vtc.ops.select import in_groups
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain.neighbours import plain_hierarchical, plain_neighbours, plain_tile_places

SCORES = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.5, 1.0, 3.0])  # few values: ties everywhere


@st.composite
def tilings(draw: st.DrawFn) -> dict[str, Tensor]:
    """group, row, col, mask of up to three items made of up to three tiles, with some tokens missing."""
    items = []
    step, shift = draw(st.sampled_from([1.0, 2.0, 1.375])), draw(st.sampled_from([0.0, 0.5]))
    for _ in range(draw(st.integers(1, 3))):
        tiles = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
        tokens = [
            (g, shift + step * r, shift + step * c)
            for g, (h, w) in enumerate(tiles)
            for r in range(h)
            for c in range(w)
        ]
        items.append(torch.tensor(draw(st.permutations(tokens))))
    padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)
    group = padded[..., 0].long()
    return {"group": group, "row": padded[..., 1], "col": padded[..., 2], "mask": group >= 0}


@given(tilings())
def test_places_inside_tiles(tokens: dict[str, Tensor]) -> None:
    jitter = dict(tokens) | {"row": tokens["row"] + 1e-4 * torch.rand(tokens["row"].shape)}  # rounding of a shrunk map
    expected = plain_tile_places(**tokens)
    assert all(torch.equal(*pair) for pair in zip(tile_places(**tokens), expected, strict=True))
    assert all(torch.equal(*pair) for pair in zip(tile_places(**jitter), expected, strict=True))


@given(tilings(), st.sampled_from(["clamp", "drop"]), st.data())
def test_neighbours_of_tiles_with_holes(tokens: dict[str, Tensor], border: Any, data: st.DataObject) -> None:
    place, width, size = tile_places(**tokens)
    mask = tokens["mask"] & torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=place.numel(), max_size=place.numel()))
    ).view_as(place)
    arguments = (tokens["group"], place, width, size, mask, border)
    found, expected = neighbours(*arguments), plain_neighbours(*arguments)
    assert torch.equal(found[mask], expected[mask])


def test_borders_by_hand() -> None:
    """A tile of 3 x 4: the released code runs on over the ends of rows and gathers the outside in two corners."""
    group, every = torch.zeros(1, 12).long(), torch.ones(1, 12, dtype=torch.bool)
    row, col = (each[None] for each in torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0)).T)
    places = tile_places(group, row, col, every)
    clamp = neighbours(group, *places, every, "clamp")[0].tolist()
    drop = neighbours(group, *places, every, "drop")[0].tolist()
    assert clamp[3] == [2, 4, 0, 7]
    assert drop[3] == [2, 3, 3, 7]
    assert clamp[8] == [7, 9, 4, 11]
    assert drop[8] == [8, 9, 4, 8]
    assert clamp[5] == drop[5] == [4, 6, 1, 9]


@given(tilings(), st.sampled_from(["clamp", "drop"]), st.none() | st.sampled_from([0.0, 0.5, 1.0]), st.data())
def test_the_choice_of_one_tile_after_the_other(
    tokens: dict[str, Tensor], border: Any, penalty: float | None, data: st.DataObject
) -> None:
    group, mask = tokens["group"], tokens["mask"]
    near = neighbours(group, *tile_places(**tokens), mask, border)
    draw = lambda kind, count: data.draw(st.lists(kind, min_size=count, max_size=count))  # noqa: E731
    middle, deep = (torch.tensor(draw(SCORES, group.numel())).view_as(group) for _ in range(2))
    tiles = int(group.max()) + 1
    sizes = torch.stack([(group == tile).sum(1) for tile in range(tiles)], dim=1)
    share = torch.tensor([[data.draw(st.integers(0, n)) for n in row] for row in sizes.tolist()])
    anchors = torch.tensor([[data.draw(st.integers(0, n)) for n in row] for row in share.tolist()])
    less = None if penalty is None else torch.full((len(group), 1), penalty)
    place, real = (each.flatten(0, 1) for each in in_groups(group, tiles, int(sizes.max()), mask))
    arguments = (middle, deep, near, Parts(real, place, mask), share.flatten(), anchors.flatten(), less)
    found = hierarchical(*arguments)
    assert torch.equal(found, plain_hierarchical(*arguments))
    if penalty is None:
        kept = torch.stack([((group == tile) & found).sum(1) for tile in range(tiles)], dim=1)
        assert torch.equal(kept, share)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_anchors_round_as_python_does(alpha: float) -> None:
    found = anchors_of(torch.arange(3000), alpha).tolist()
    assert found == [round((budget * alpha) / 5) for budget in range(3000)]


# --- the whole method
CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
INTERN = ModelSpec("internvl", 24, 23, True, tuple(range(24)), 28)
QWEN2, QWEN3 = (ModelSpec("qwen2-vl", n, n - 1, False, tuple(range(n)), 28, mrope=True) for n in (32, 27))
QWEN = ModelSpec("qwen2.5-vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def plain_tile(
    middle: list[float], deep: list[float], cells: list[tuple[float, float]], keep: int, alpha: float, border: str
) -> list[int]:
    """Kept tokens of one tile: anchors, then buffers, then registers. cells: row and column of each token."""
    rows, cols = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    stride, last = len(cols), len(rows) * len(cols) - 1
    number = [rows.index(r) * stride + cols.index(c) for r, c in cells]
    token = {n: j for j, n in enumerate(number)}
    count = round((keep * alpha) / 5)
    best = lambda tokens, score: sorted(tokens, key=lambda j: (-score[j], j))  # noqa: E731
    anchors = best(range(len(cells)), middle)[:count]
    buffers: set[int] = set()
    for j in anchors:
        for step in (-1, 1, -stride, stride):
            target = number[j] + step
            if border == "clamp":
                buffers.add(token[max(0, min(last, target))])
            elif 0 <= target <= last and (abs(step) == stride or target // stride == number[j] // stride):
                buffers.add(token[target])
    union = [*anchors, *best(buffers - set(anchors), middle)][:keep]
    rest = best(set(range(len(cells))) - set(union), deep)
    return sorted([*union, *rest[: keep - len(union)]])


@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 40}, {"retention": 1 / 3}, {"retention": 0.9}], ids=str)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"alpha": 1.0, "border": "drop"}, {"alpha": 0}], ids=str)
@pytest.mark.parametrize("newlines", ["drop", "keep"])
def test_the_plain_choice(
    make_view: Any, kept: Any, shares: Any, shape: Any, budget: Any, options: Any, newlines: Any
) -> None:
    shapes = [shape(((1, 6, 6), (2, 5, 7)), newlines=True), (9, 7), (1, 1), shape(((3, 4, 5),))]
    counts = [36 + 70 + 10, 63, 1, 60]
    generator = torch.Generator().manual_seed(1)
    readings = [(8, Rows.RECEIVED), (22, Rows.RECEIVED)]
    vision = {key: [torch.rand(n, generator=generator).mul(30).round() for n in counts] for key in readings}
    view = make_view(shapes, vision=vision, **budget)
    method = vtc.create("hiprune", newlines=newlines, **options)
    selection = method.select(view)
    found = kept(view, selection)
    for item, layout in enumerate(view.items.layouts):
        scores = [vision[key][item].tolist() for key in readings]
        tiles = [[j for j in range(layout.n_tokens) if layout.crop[j] == c] for c in range(layout.n_crops)]
        total = min(view.granted[item], view.items.counts[item]) if newlines == "drop" else view.keep[item]
        expected = []
        for tile, keep in zip(tiles, shares(total, [len(tile) for tile in tiles]), strict=True):
            cells = [(layout.row[j].item(), layout.col[j].item()) for j in tile]
            middle, deep = ([score[j] for j in tile] for score in scores)
            chosen = plain_tile(middle, deep, cells, keep, method.alpha, method.border)
            expected += [tile[j] for j in chosen]
        assert found[item] == sorted(expected)
    assert selection.separators is None if newlines == "keep" else selection.separators is False


def test_the_officials_even_split_loses_the_remainder(make_view: Any, kept: Any, shape: Any) -> None:
    shapes = [shape(((1, 4, 4), (3, 4, 4))), shape(((1, 1, 3), (1, 4, 4)))]
    scores = {(layer, Rows.RECEIVED): [torch.rand(64), torch.rand(19)] for layer in (8, 22)}
    view = make_view(shapes, vision=scores, keep=15)
    found = kept(view, vtc.create("hiprune", split="floor").select(view))
    tiles = [[layout.crop[j].item() for j in tokens] for layout, tokens in zip(view.items.layouts, found, strict=True)]
    assert [tiles[0].count(tile) for tile in range(4)] == [3, 3, 3, 3]
    assert [tiles[1].count(tile) for tile in range(2)] == [3, 7]
    assert [len(each) for each in kept(view, vtc.create("hiprune").select(view))] == [15, 15]


@pytest.mark.parametrize(("spec", "lowered"), [(CLIP_L, 1.0), (QWEN2, 1 / 24)])
def test_the_official_exclusion_takes_one_from_the_mean_or_from_the_sum(
    make_view: Any, kept: Any, spec: ModelSpec, lowered: float
) -> None:
    """One anchor in the middle of 4 x 6 tokens; what is taken away decides whether the sink on it is chosen twice."""
    middle, deep = torch.zeros(24), torch.linspace(0.01, 0.02, 24)
    middle[8], deep[8] = 1.0, 0.9
    layers = vtc.create("hiprune").layers(spec)
    vision = {(layer, Rows.RECEIVED): [row] for layer, row in zip(layers, (middle, deep), strict=True)}
    view = make_view([(4, 6)], vision=vision, spec=spec, keep=10)
    exact = vtc.create("hiprune", alpha=0.5).select(view)
    official = vtc.create("hiprune", alpha=0.5, collision="official").select(view)
    assert kept(view, exact)[0] == [2, 7, 8, 9, 14, 19, 20, 21, 22, 23]
    expected = kept(view, exact)[0] if deep[8] - lowered < 0 else [2, 7, 8, 9, 14, 20, 21, 22, 23]
    assert kept(view, official)[0] == expected
    assert official.counts is None


def test_room_beside_all_tokens_is_spent_on_separators(make_view: Any, kept: Any, shape: Any) -> None:
    shapes = [shape(((1, 2, 2), (1, 3, 4)), newlines=True), (5, 5)]
    vision = {(layer, Rows.RECEIVED): [torch.rand(19), torch.rand(25)] for layer in (8, 22)}
    for budget, newlines in ((16, [False] * 3), (17, [True, False, False]), (19, [True] * 3)):
        view = make_view(shapes, vision=vision, keep=budget)
        selection = vtc.create("hiprune").select(view)
        assert [len(each) for each in kept(view, selection)] == [16, budget]
        found = [False] * 3 if selection.separators is False else selection.separators[0].tolist()
        assert found == newlines


@pytest.mark.parametrize("seed", [3, 4])
def test_separators_of_rows_that_still_have_tokens(make_view: Any, kept: Any, shape: Any, seed: int) -> None:
    """The rows of the last raster: what is kept of an overview in front of it belongs to none of them."""
    shapes = [shape(((1, 2, 2), (2, 3, 4)), newlines=True), (5, 5), shape(((1, 3, 3),), newlines=True)]
    counts = [4 + 24 + 6, 25, 12]
    generator = torch.Generator().manual_seed(seed)
    vision = {(layer, Rows.RECEIVED): [torch.rand(n, generator=generator) for n in counts] for layer in (8, 22)}
    for scores in vision.values():
        scores[0][:4], scores[0][4:8] = 1.0, 0.0  # tokens of the overview stay, none of the first row behind it
    dropped = misleading = 0
    for budget in (4, 5, 8, 10, 12, 20):
        view = make_view(shapes, vision=vision, keep=budget)
        selection = vtc.create("hiprune", newlines="rows").select(view)
        for item, (layout, tokens) in enumerate(zip(view.items.layouts, kept(view, selection), strict=True)):
            ends = [j for j in range(layout.n_tokens) if layout.newline[j]]
            last = layout.n_tokens - layout.newlines - math.prod(layout.regions[-1])
            begins = [last, *(end + 1 for end in ends)]
            expected = [any(b <= j < e for j in tokens) for b, e in zip(begins, ends, strict=False)]
            assert selection.separators[item, : len(ends)].tolist() == expected
            assert len(tokens) + sum(expected) <= max(budget, 1 + sum(expected))
            dropped += expected.count(False)
            misleading += any(j < last for j in tokens) and expected[:1] != [True]
    assert dropped > 3
    assert misleading > 0


# --- layers
@pytest.mark.parametrize(
    ("options", "spec", "layers"),
    [
        ({}, CLIP_L, (8, 22)),  # the published ones
        ({}, QWEN, (15, 31)),
        ({}, SIGLIP, (9, 26)),
        ({}, INTERN, (8, 23)),
        ({}, QWEN2, (15, 31)),
        ({}, QWEN3, (13, 26)),
        ({}, dataclasses.replace(CLIP_L, feature_layer=4), (4, 4)),
        ({}, dataclasses.replace(QWEN, full_attention_layers=(5, 11, 19, 27)), (19, 27)),  # as near: the deeper one
        ({}, dataclasses.replace(CLIP_L, vision_layers=1, feature_layer=0, full_attention_layers=(0,)), (0, 0)),
        ({"object_layer": 1}, CLIP_L, (0, 22)),
        ({"object_layer": 23}, CLIP_L, (22, 22)),
        ({"object_layer": 8}, QWEN, (7, 31)),
    ],
)
def test_object_and_deep_layer(options: Any, spec: ModelSpec, layers: tuple[int, int]) -> None:
    method = vtc.create("hiprune", **options)
    assert method.layers(spec) == layers
    assert method.plan(spec).needs == vtc.Needs(vision=dict.fromkeys(layers, Rows.RECEIVED))
    assert method.plan(spec).positions == ("preserve" if spec.mrope else "compact")
    assert method.plan(spec).stages == (vtc.PRE_LLM,)


@pytest.mark.parametrize(("layer", "spec", "known"), [(24, CLIP_L, r"1, 2, .*22, 23"), (9, QWEN, "8, 16, 24, 32")])
def test_object_layers_that_see_no_whole_image(layer: int, spec: ModelSpec, known: str) -> None:
    with pytest.raises(UnsupportedMethod, match=rf"object_layer={layer} .* choose from {known} \(counted from 1\)"):
        vtc.create("hiprune", object_layer=layer).plan(spec)
    blind = dataclasses.replace(spec, full_attention_layers=())
    with pytest.raises(UnsupportedMethod, match=r"no encoder layer of this .* model sees a whole image"):
        vtc.create("hiprune").plan(blind)


def test_defaults_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("hiprune")) == {
        "alpha": 0.1,
        "object_layer": None,
        "border": "clamp",
        "collision": "exact",
        "split": "exact",
        "newlines": "drop",
    }
    with pytest.raises(VTCError, match=r"alpha=nan of 'hiprune' is not a finite number; write for example alpha=0\.1"):
        vtc.create("hiprune", alpha=math.nan)
    for alpha in (-0.1, 1.1):
        with pytest.raises(VTCError, match=r"alpha=.* is no share of the budget; .* the paper uses 0.1"):
            vtc.create("hiprune", alpha=alpha)
    with pytest.raises(VTCError, match=r"object_layer=0 is no layer; they are counted from 1 .* 9 of 24 and 16 of 32"):
        vtc.create("hiprune", object_layer=0)
    with pytest.raises(VTCError, match=r"unknown border 'clmp'; did you mean 'clamp'"):
        vtc.create("hiprune", border="clmp")
    for field in ("collision", "split", "newlines"):
        with pytest.raises(VTCError, match=f"unknown {field} 'x'"):
            vtc.create("hiprune", **{field: "x"})


# --- on models
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@torch.no_grad()
def eager_means(name: str, pixels: Tensor, layers: tuple[int, int]) -> list[Tensor]:
    """[crops, N] what each patch receives in two layers, mean over heads and all queries."""
    model = tiny_model(name, attn_implementation="eager")
    seen: dict[Any, Tensor] = {}
    modules = [adapters.of(model).vision_attention[layer] for layer in layers]
    for module in modules:
        module.register_forward_hook(lambda module, args, output: seen.__setitem__(module, output[1]))
    model.model.get_image_features(pixels, return_dict=True)
    first = 1 if adapters.of(model).spec.has_cls else 0
    return [seen[module].mean((1, 2))[:, first:] for module in modules]


@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip"])
@pytest.mark.parametrize("keep", [1, 6, 13])
def test_the_kept_set_is_that_of_eager_attention(name: str, keep: int) -> None:
    inputs = tiny_inputs(name, LAYOUT, seed=2)
    model, method = tiny_model(name), vtc.create("hiprune", alpha=0.8)
    middle, deep = eager_means(name, inputs["pixel_values"], method.layers(adapters.of(model).spec))
    with vtc.compress(model, method, keep=keep) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    cells = [(float(r), float(c)) for r in range(4) for c in range(4)]
    for item, record in enumerate(handle.trace[0].items):
        expected = plain_tile(middle[item].tolist(), deep[item].tolist(), cells, keep, 0.8, "clamp")
        assert record.kept[0].tolist() == expected


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("newlines", ["drop", "rows", "keep"])
def test_the_budget_is_met_on_every_model(name: str, newlines: Any) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        # Separators that stay may be more than a fifth of the tokens, and one token stays beside them.
        for retention in (0.2, 0.5, 0.75)[newlines == "keep" :]:
            with torch.no_grad(), vtc.compress(model, "hiprune", retention=retention, newlines=newlines) as handle:
                model(**inputs)
            (call,) = handle.stats.calls
            wanted = sum(vtc.tokens_to_keep(len(item.positions), retention) for item in handle.trace[0].items)
            assert sum(call.visual_tokens_kept) <= wanted
            if newlines != "rows":
                assert sum(call.visual_tokens_kept) == wanted


def test_videos_are_chosen_frame_by_frame() -> None:
    model = tiny_model("qwen2.5-vl")
    inputs = tiny_inputs("qwen2.5-vl", [[4, "video", 5]], seed=1, model=model)
    with torch.no_grad(), vtc.compress(model, "hiprune", retention=0.5) as handle:
        model(**inputs)
    (item,) = handle.trace[0].items
    frames = item.map().flatten(1).sum(1).tolist()
    assert len(frames) > 1
    assert max(frames) - min(frames) <= 1


def test_long_videos_stay_small(peak_memory: Any) -> None:
    """100 000 tokens in 174 frames; one table of N x N bytes would be 10 GB."""
    setup = """
from vtc.methods.hiprune.neighbours import hierarchical, neighbours, tile_places
from vtc.method.groups import Parts
from vtc.ops.select import in_groups
frames, rows, cols = 174, 24, 24
group = torch.arange(frames).repeat_interleave(rows * cols)[None]
row, col = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float().repeat(frames, 1).T[:, None]
every = torch.ones_like(group, dtype=torch.bool)
"""
    code = """
near = neighbours(group, *tile_places(group, row, col, every), every)
share = torch.full((1, frames), 64)
place, real = (each.flatten(0, 1) for each in in_groups(group, frames, rows * cols, every))
tiles, share = Parts(real, place, every), share.flatten()
keep = hierarchical(torch.rand(group.shape), torch.rand(group.shape), near, tiles, share, share // 10)
assert int(keep.sum()) == 64 * frames
"""
    assert peak_memory(setup, code) < 256 * 2**20
