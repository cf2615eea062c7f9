"""ATP and its training-free forms against their equations, one token at a time, and on tiny models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.eval.training.calibrations import atp_training_free as calibration
from vtc.method import weights
from vtc.method.base import ModelSpec, Rows, StageView
from vtc.methods.atp.method import ATP, ThresholdModule, ThresholdModules
from vtc.methods.atp.thresholds import decay_counts, sampling_grid
from vtc.ops.rank import dense_rank
from vtc.testing import TINY_MODELS, check_method, tiny_inputs, tiny_model
from vtc.testing.plain import thresholds as plain

LLAVA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, width=4096)
SHAPES = [(7, 9), (5, 5), (1, 1), (2, 3), (12, 12)]
LAYER = 4


def sums(shapes: Any, seed: int = 0) -> Tensor:
    """[2, B, L] made-up sums of attention rows, wide enough for `make_view` on these shapes (ties: the ops' cases)."""
    rows = [shapes[first : first + 2] for first in range(0, len(shapes), 2)]
    length = max(5 + sum(h * w + 1 for h, w in row) for row in rows)
    return torch.rand(2, len(rows), length, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def view(make_view: Any) -> Callable[..., StageView]:
    def make(shapes: Any = SHAPES, seed: int = 0, **options: Any) -> StageView:
        recorded = {(LAYER, Rows.GROUP_SUMS): sums(shapes, seed)}
        made: StageView = make_view(shapes, llm=recorded, stage=LAYER + 1, spec=LLAVA, **options)
        return made

    return make


def with_module(made: StageView, method: ATP, seed: int = 0) -> StageView:
    """The view with modules whose thresholds lie somewhere inside the scores."""
    torch.manual_seed(seed)
    module = method.build(made.model)
    for part in module.atp.values():
        assert isinstance(part, ThresholdModule)
        torch.nn.init.normal_(part.head_r.weight, std=0.5)
        torch.nn.init.normal_(part.head_s.weight, std=0.5)
        torch.nn.init.constant_(part.head_r.bias, 0.5)
        torch.nn.init.constant_(part.head_s.bias, 0.7)
    return dataclasses.replace(made, module=module.requires_grad_(False))


def plain_scores(made: StageView, norm: str = "minmax") -> list[dict[str, list[float]]]:
    """own, cross and redundancy of every item's tokens: eq. 3 and 4 divided by the number of rows, then scaled."""
    text, visual = made.llm_rows[LAYER, Rows.GROUP_SUMS]
    found = []
    for item, layout in enumerate(made.items.layouts):
        row = int(made.items.row[item])
        places = made.items.index[item][: layout.n_tokens].tolist()
        scores = {}
        for name, table, group in (("cross", text, made.text), ("own", visual, made.visual)):
            values = [float(table[row, place]) / int(group[row].sum()) for place in places]
            if norm == "minmax":
                low, high = min(values), max(values)
                values = [(value - low) / (high - low + 1e-12) for value in values]
            scores[name] = values
        scores["red"] = [(a + b) / 2 for a, b in zip(scores["own"], scores["cross"], strict=True)]
        found.append(scores)
    return found


def plain_spatial(row: int, col: int, strides: tuple[int, ...] = (2, 4, 8)) -> float:
    return max([min(1.0, max(0.0, 1 - 3 / s**2)) for s in strides if row % s == 0 and col % s == 0], default=0.0)


def plain_theta(part: ThresholdModule, own: list[float], cross: list[float]) -> tuple[float, float]:
    """Pool, one hidden layer, two sigmoids, in float64."""
    ends = [(b * len(own) // part.bins, math.ceil((b + 1) * len(own) / part.bins)) for b in range(part.bins or 0)]
    phi = [sum(v[a:b]) / (b - a) for v in (own, cross) for a, b in ends] or [sum(v) / len(v) for v in (own, cross)]
    hidden = part.shared.weight.double() @ torch.tensor(phi).double() + part.shared.bias.double()
    hidden = hidden.relu() if part.relu else hidden
    heads = (part.head_r, part.head_s)
    theta_r, theta_s = (float((h.weight.double() @ hidden + h.bias.double()).sigmoid()) for h in heads)
    return theta_r, theta_s


# --- the learned form
@pytest.mark.parametrize(
    "options", [{}, {"feature": "mean"}, {"relu": False}, {"score_norm": "none"}, {"strides": (2,)}], ids=str
)
def test_the_plain_thresholds(view: Any, kept: Any, options: dict[str, Any]) -> None:
    method = ATP(bins=8, hidden=8, **options)
    seen = with_module(view(), method)
    part = seen.module.part(LAYER)  # type: ignore[union-attr, operator]
    found = kept(seen, method.select(seen))
    sizes = set()
    for item, scores in enumerate(plain_scores(seen, method.score_norm)):
        theta_r, theta_s = plain_theta(part, scores["own"], scores["cross"])
        width = SHAPES[item][1]
        spatial = [plain_spatial(j // width, j % width, method.strides) for j in range(len(scores["red"]))]
        chosen = [j for j, red in enumerate(scores["red"]) if red > theta_r or spatial[j] > theta_s]
        best = max(range(len(spatial)), key=lambda j: (scores["red"][j], -j))
        assert found[item] == (chosen or [best])
        sizes.add(len(chosen))
    assert len(sizes) > 1


def test_nothing_above_the_thresholds_keeps_the_best(view: Any, kept: Any) -> None:
    seen = view()
    module = ThresholdModules({LAYER: ThresholdModule(4, 4, True)})
    part = module.part(LAYER)
    torch.nn.init.constant_(part.head_r.bias, 50.0)  # type: ignore[union-attr, arg-type]
    torch.nn.init.constant_(part.head_s.bias, 50.0)  # type: ignore[union-attr, arg-type]
    seen = dataclasses.replace(seen, module=module.requires_grad_(False))
    found = kept(seen, ATP(layers=(LAYER,)).select(seen))
    for numbers, scores in zip(found, plain_scores(seen), strict=True):
        assert numbers == [max(range(len(scores["red"])), key=lambda j: (scores["red"][j], -j))]


def test_a_fresh_module_keeps_nearly_everything(view: Any) -> None:
    seen = view()
    module = ATP().build(LLAVA)
    assert sum(p.numel() for p in module.part(LAYER).parameters()) == 131_842
    assert sum(p.numel() for p in ATP(feature="mean").build(LLAVA).part(LAYER).parameters()) == 20_482
    own, cross, mask = torch.rand(3, 9), torch.rand(3, 9), torch.ones(3, 9, dtype=torch.bool)
    theta_r, theta_s = module.part(LAYER)(own, cross, mask)
    assert theta_r.tolist() == pytest.approx([torch.tensor(-3.0).sigmoid().item()] * 3)
    assert theta_s.tolist() == pytest.approx([torch.tensor(3.0).sigmoid().item()] * 3)
    assert set(module.state_dict()) == {
        f"atp.layer{layer}.{part}.{kind}"
        for layer in (4, 14, 24)
        for part in ("shared", "head_r", "head_s")
        for kind in ("weight", "bias")
    }
    assert ATP(layers=(LAYER,)).select(dataclasses.replace(seen, module=module)) is not None


def test_the_grid_is_that_of_the_input(view: Any) -> None:
    """Tokens that are gone leave gaps on the grid; the survivors are not numbered anew."""
    seen = view([(7, 9), (5, 5)])
    gone = torch.zeros_like(seen.items.mask)
    gone[0, ::3], gone[1, 5:] = True, True
    counts = (seen.items.mask & ~gone).sum(1).tolist()
    moved = torch.arange(seen.hidden.shape[1]).expand(len(seen.hidden), -1)
    left = dataclasses.replace(seen, items=seen.items.kept(~gone, counts, moved))
    row, col = ATP().places(left)
    for item, width in enumerate((9, 5)):
        numbers = left.items.token[item][: counts[item]]
        assert row[item][: counts[item]].tolist() == (numbers // width).tolist()
        assert col[item][: counts[item]].tolist() == (numbers % width).tolist()


def test_every_crop_and_frame_has_a_grid_of_its_own(make_view: Any, shape: Any) -> None:
    shapes = [shape(((1, 3, 3), (2, 2, 7)), newlines=True), shape(((3, 4, 5),))]
    seen = make_view(shapes, stage=1, spec=LLAVA)
    row, col = ATP().places(seen)
    for item in range(2):
        n = seen.items.counts[item]
        crops = seen.crop[item][:n].tolist()
        starts = {crop: crops.index(crop) for crop in crops}
        assert all(int(row[item, at]) == int(col[item, at]) == 0 for at in starts.values())
        assert row[item][:n].tolist() == seen.place[0][item][:n].tolist()
        assert col[item][:n].tolist() == seen.place[1][item][:n].tolist()


def test_pooled_coordinates_become_lines() -> None:
    rows = torch.tensor([[0.5, 0.5, 2.5, 2.5, 4.5, 4.5]])
    assert dense_rank(rows, torch.zeros(1, 6).long(), 0.01).tolist() == [[0, 0, 1, 1, 2, 2]]
    noisy = torch.tensor([[0.0, 1e-4, 1.0, 0.9999, 7.0, 7.0]])
    assert dense_rank(noisy, torch.tensor([[0, 0, 0, 0, 0, 1]]), 0.01).tolist() == [[0, 0, 1, 1, 2, 0]]


def test_the_causal_correction_divides_by_the_rows_that_see_a_token(view: Any) -> None:
    seen = view([(2, 3)])
    own = ATP(score_norm="none", causal_correction=True).scores(seen, seen.items.mask).own[0]
    table = seen.llm_rows[LAYER, Rows.GROUP_SUMS][1, 0][seen.items.index[0]]
    assert torch.allclose(own, table / torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))


# --- soft masks and losses
def test_soft_masks_multiply_and_set_the_losses(view: Any) -> None:
    method = ATP(layers=(LAYER, 14), bins=8, hidden=8, training=True, target_tokens=7.0, temperature=6.0)
    first = with_module(view(), method)
    one = method.select(first)
    second = dataclasses.replace(
        with_module(view(seed=1), method),
        stage=15,
        memory=first.memory,
        needs=dataclasses.replace(first.needs, llm={14: Rows.GROUP_SUMS}),
    )
    second.llm_rows[14, Rows.GROUP_SUMS] = second.llm_rows.pop((LAYER, Rows.GROUP_SUMS))
    two = method.select(second)
    mask = first.items.mask
    for selection in (one, two):
        assert torch.equal(selection.keep, mask) and selection.counts == first.items.counts
        assert ((selection.weights > 0) & (selection.weights <= 1)).all()
        assert (selection.weights[~mask] == 1).all()
    products = [one.weights * mask, one.weights * two.weights * mask]
    kept = torch.stack([product.sum(1) for product in products])
    tokens = torch.tensor([float(h * w) for h, w in SHAPES])
    depth = plain.depth_loss(kept, tokens, (LAYER, 14))
    mean = plain.mean_over_layers(kept, tokens, (LAYER, 14), 32)
    expected = 0.05 * depth + 0.2 * plain.target_loss(mean, 7.0)
    assert float(one.loss + two.loss) == pytest.approx(float(expected), rel=1e-5)
    by_modules = dataclasses.replace(method, average="modules", normalise_target=True)
    last = by_modules.select(
        dataclasses.replace(second, memory={("atp", "product"): products[0], ("atp", "kept"): [kept[0]]})
    )
    assert last is not None and last.loss is not None
    distance = 0.2 * abs(float(kept.mean()) - 7.0) / float(tokens.mean())
    alone = 0.05 * plain.depth_loss(kept[1:], tokens, (14,))
    assert float(last.loss) == pytest.approx(float(alone) + distance, rel=1e-5)


def test_text_in_front_of_every_image_asks_nothing(view: Any) -> None:
    """Its rows see no visual token and do not count in the mean."""
    made = view()
    found = ATP(score_norm="none").scores(made, made.items.mask)
    sums_of_text = made.llm_rows[LAYER, Rows.GROUP_SUMS][0]
    for item, layout in enumerate(made.items.layouts):
        row = int(made.items.row[item])
        first = int(made.visual[row].int().argmax())
        behind = int(made.text[row, first:].sum())
        assert 0 < behind < int(made.text[row].sum())
        places = made.items.index[item][: layout.n_tokens]
        assert torch.allclose(found.cross[item, : layout.n_tokens], sums_of_text[row, places] / behind)


def test_what_is_half_masked_sets_no_scale(view: Any) -> None:
    method = ATP(layers=(LAYER,), bins=8, hidden=8, training=True)
    seen = with_module(view([(5, 5)]), method)
    seen.llm_rows[LAYER, Rows.GROUP_SUMS][..., seen.items.index[0, 3]] = 50.0  # an outlier
    product = seen.items.mask.float()
    product[0, 3] = 0.4
    seen.memory["atp", "product"] = product
    found = method.select(seen)
    assert found is not None and found.weights is not None
    scores = plain_scores(dataclasses.replace(seen, llm_rows={(LAYER, Rows.GROUP_SUMS): sums([(5, 5)])}))[0]
    others = [j for j in range(25) if j != 3]
    part = seen.module.part(LAYER)  # type: ignore[union-attr, operator]
    values = {}
    for name, raw in (("own", 1), ("cross", 0)):
        row = seen.llm_rows[LAYER, Rows.GROUP_SUMS][raw, 0, seen.items.index[0]]
        low, high = row[others].min(), row[others].max()
        values[name] = ((row - low) / (high - low)).clamp(0, 1).tolist()
    assert values["own"][3] == 1.0 and scores
    theta_r, theta_s = plain_theta(part, *([values[name][j] for j in others] for name in ("own", "cross")))
    red = torch.tensor([(a + b) / 2 for a, b in zip(values["own"], values["cross"], strict=True)])
    spatial = torch.tensor([plain_spatial(j // 5, j % 5) for j in range(25)])
    expected = torch.maximum(((red - theta_r) * 10).sigmoid(), ((spatial - theta_s) * 10).sigmoid())
    assert torch.allclose(found.weights[0], expected, atol=1e-5)


def spread(model: Any, method: ATP, seed: int = 0) -> dict[str, Tensor]:
    """Parameters that put the thresholds in the middle of the scores."""
    torch.manual_seed(seed)
    module = method.build(adapters.of(model).spec)
    state = {name: torch.randn_like(value) * 0.3 for name, value in module.state_dict().items()}
    return {
        name: value + 0.8 if name.endswith("head_s.bias") else value - 1.2 * name.endswith("head_r.bias")
        for name, value in state.items()
    }


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[Any, ATP], ATP]:
    """The method with spread-out weights from a file."""

    def make(model: Any, method: ATP) -> ATP:
        spec = adapters.of(model).spec
        module = dataclasses.replace(method, training=True, weights=None).module(spec)
        module.load_state_dict(spread(model, method))
        path = method.save(tmp_path / "weights.safetensors", module, spec)
        return dataclasses.replace(method, weights=str(path), training=False)

    return make


def test_steep_soft_masks_are_hard_masks(clip: Any, stored: Any) -> None:
    """Without a slope, training and inference differ by keys of weight 1e-6 only."""
    method = stored(clip, ATP(layers=(1,), bins=4, hidden=4, temperature=1e9))
    inputs = tiny_inputs("llava-clip", [[4, "image", 3], [2, "image", 9]])
    with torch.no_grad():
        with vtc.compress(clip, method) as hard:
            expected = clip(**inputs, use_cache=False).logits[:, -1]
        soft = dataclasses.replace(method, training=True)
        with vtc.compress(clip, soft, pad_output=True) as handle:
            found = clip(**inputs, use_cache=False).logits[:, -1]
        untouched = clip(**inputs, use_cache=False).logits[:, -1]
    assert 0.3 < hard.stats.retention < 0.9
    assert handle.stats.retention == 1.0
    assert float((found - expected).abs().max()) < 1e-3 < float((untouched - expected).abs().max())


def test_gradients_reach_every_parameter(clip: Any, stored: Any) -> None:
    method = ATP(layers=(0, 2), bins=4, hidden=4, lambda_sample=0.5)  # a grid worth more than most scores
    method = dataclasses.replace(stored(clip, method), training=True)
    clip.requires_grad_(False)
    inputs = tiny_inputs("llava-clip", [[4, "image", 6]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    with vtc.compress(clip, method, pad_output=True) as handle:
        for part in ("answer", "method"):
            loss = clip(**inputs, labels=labels, use_cache=False).loss
            assert handle.module is not None and handle.auxiliary_loss is not None
            (loss if part == "answer" else handle.auxiliary_loss).backward()
            for name, parameter in handle.module.named_parameters():
                assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, (part, name)
            handle.module.zero_grad()


def test_the_answer_sets_no_score(clip: Any, stored: Any) -> None:
    method = dataclasses.replace(stored(clip, ATP(layers=(1,), bins=4, hidden=4)), training=True)
    inputs = tiny_inputs("llava-clip", [[4, "image", 6]])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -2:] += 1
    found = []
    for given_ in (inputs, changed):
        with vtc.compress(clip, method, pad_output=True) as handle, torch.no_grad():
            clip(**given_, labels=labels, use_cache=False)
        found.append(float(handle.auxiliary_loss))  # type: ignore[arg-type]
    assert found[0] == found[1]


# --- exact counts
@given(st.integers(1, 3000), st.integers(0, 40), st.floats(0.05, 1), st.integers(2, 60), st.data())
def test_the_schedule_meets_the_mean(tokens: int, fixed: int, share: float, depth: int, data: st.DataObject) -> None:
    layers = tuple(sorted(data.draw(st.sets(st.integers(0, depth - 2), min_size=1, max_size=4))))
    granted = vtc.tokens_to_keep(tokens + fixed, share)
    target = granted - fixed
    if depth * target < tokens * (layers[0] + 1):
        with pytest.raises(BudgetError, match=rf"cannot be met: {layers[0] + 1} of {depth} LLM layers see {tokens} "):
            decay_counts(tokens, granted, layers, depth, fixed=fixed)
        return
    kept = decay_counts(tokens, granted, layers, depth, fixed=fixed)
    assert kept == sorted(kept, reverse=True)
    assert all(1 <= count <= tokens for count in kept)
    mean = plain.mean_over_layers(torch.tensor(kept)[:, None], torch.tensor([float(tokens)]), layers, depth)
    assert abs(float(mean) - target) <= 1 + 1e-6


def test_the_published_schedule() -> None:
    assert decay_counts(576, 144, (4, 14, 24), 32) == [135, 31, 7]
    message = r"a mean of 64 of 576 .* 5 of 32 LLM layers see 576 tokens .* ask for at least 90 .* prune earlier"
    with pytest.raises(BudgetError, match=message):
        decay_counts(576, 64, (4, 14, 24), 32, of=576)


@pytest.mark.parametrize(
    ("tokens", "granted", "fixed", "layers", "depth", "kept"),
    [
        (576, 90, 0, (4, 14, 24), 32, [1, 1, 1]),
        (576, 576, 0, (4, 14, 24), 32, [576, 576, 576]),
        (2880, 720, 24, (4, 14, 24), 32, [628, 137, 29]),
        (150, 40, 7, (0, 3), 8, [30, 6]),
        (3, 1, 0, (0,), 4, [1]),
    ],
)
def test_counts_stay_what_they_were(
    tokens: int, granted: int, fixed: int, layers: tuple[int, ...], depth: int, kept: list[int]
) -> None:
    assert decay_counts(tokens, granted, layers, depth, fixed=fixed) == kept


@pytest.mark.parametrize("budget", [{"retention": 0.25}, {"retention": 0.5}, {"retention": 1.0}, {"keep": 30}], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_plain_budget(view: Any, kept: Any, budget: Any, share: float) -> None:
    shapes = [(7, 9), (5, 5), (12, 12)]
    seen = view(shapes, **budget)
    method = vtc.create("atp_training_free", spatial_share=share)
    found = kept(seen, method.select(seen))
    granted = zip(shapes, seen.granted, strict=True)
    counts = [decay_counts(h * w, mean, (4, 14, 24), 32)[0] for (h, w), mean in granted]
    for item, scores in enumerate(plain_scores(seen)):
        width, count = shapes[item][1], min(counts[item], len(scores["red"]))
        grids = {s: [j for j in range(len(scores["red"])) if not (j // width % s or j % width % s)] for s in (2, 4, 8)}
        grid = next((grids[s] for s in (2, 4, 8) if len(grids[s]) <= share * count), [])
        rest = sorted(set(range(len(scores["red"]))) - set(grid), key=lambda j: (-scores["red"][j], j))
        assert found[item] == sorted([*grid, *rest[: count - len(grid)]])


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("retention", [0.4, 0.62, 0.9])
def test_the_mean_is_met_on_every_model(name: str, retention: float) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12], [9]])
        with vtc.compress(model, "atp_training_free", retention=retention) as handle, torch.no_grad():
            model(**inputs)
        call = handle.stats.calls[0]
        for row, (kept_, tokens) in enumerate(zip(call.visual_tokens_kept, call.visual_tokens_in, strict=True)):
            items = sum(item.row == row for item in handle.trace[0].items)
            assert abs(kept_ - retention * tokens) <= max(0.01 * tokens, 1.5 * items)


@pytest.mark.parametrize(("keep", "stride"), [(64, 2), (63, 4), (16, 4), (15, 8), (4, 8), (3, None)])
def test_the_densest_grid_that_fits_fills_its_share_exactly(keep: int, stride: int | None) -> None:
    """An 8 x 8 raster has grids of 16, 4 and 1 tokens; a quarter of the kept ones may lie on one."""
    row, col = (each[None] for each in torch.cartesian_prod(torch.arange(8), torch.arange(8)).T)
    found = sampling_grid(row, col, (2, 4, 8), 0.25, torch.tensor([keep]), torch.ones(1, 64, dtype=torch.bool))
    expected = [stride is not None and r % stride == c % stride == 0 for r in range(8) for c in range(8)]
    assert found[0].tolist() == expected


def test_counts_may_be_given_outright(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", [[4, "image", 3], [2, "image", 9]])
    method = vtc.create("atp_training_free", shares=[0.5, 0.1])
    assert not method.needs_budget
    with vtc.compress(clip, method) as handle, torch.no_grad():
        clip(**inputs)
    assert [stage.visual_tokens_out for stage in handle.stats.calls[0].stages] == [16, 4]  # 16 and 0.1 * 16 -> 2
    with pytest.raises(UnsupportedMethod, match=r"1 shares were given for 2 modules behind layers \(0, 1\)"):
        vtc.compress(clip, "atp_training_free", shares=(0.5,))


# --- constants from a calibration
def test_a_calibration_meets_its_mean_on_its_own_prompts(clip: Any, tmp_path: Path) -> None:
    prompts = [tiny_inputs("llava-clip", [[4, "image", 3 + n], [2, "image", 9]], seed=n) for n in range(6)]
    method = vtc.create("atp_training_free", layers=(0, 1))
    tensors = calibration.calibrate(clip, prompts, 0.6, method)  # type: ignore[arg-type]
    assert set(tensors) == {f"atp.layer{n}.theta_{kind}" for n in (0, 1) for kind in "rs"}
    assert all(value.shape == (1,) for value in tensors.values())
    spec = adapters.of(clip).spec
    notes = {"prompts": "12", **method.settings(spec)}  # type: ignore[attr-defined]
    path = weights.save(tmp_path / "a.safetensors", tensors, notes)
    run = vtc.create("atp_training_free", layers=(0, 1), mode="calibrated", weights=str(path))
    assert not run.needs_budget
    with vtc.compress(clip, run) as handle, torch.no_grad():
        for prompt in prompts:
            clip(**prompt)
    assert handle.stats.retention == pytest.approx(0.6, abs=0.02)
    counts = {stage.visual_tokens_out for call in handle.stats.calls for stage in call.stages}
    assert len(counts) > 2  # they follow the sample
    for changed, field in (
        ({"layers": (0,)}, "layers"),
        ({"strides": (2,)}, "strides"),
        ({"score_norm": "none"}, "score_norm"),
    ):
        with pytest.raises(VTCError, match=f"were made with {field}="):
            vtc.compress(clip, dataclasses.replace(run, **changed))
    with pytest.raises(BudgetError, match=r"retention=0\.2 of these prompts: a mean of .* cannot be met"):
        calibration.calibrate(clip, prompts[:1], 0.2, method)  # type: ignore[arg-type]


# --- plans, defaults, refusals
@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (32, (4, 14, 24)),
        (28, (3, 12, 21)),
        (40, (5, 17, 30)),
        (24, (3, 10, 18)),
        (6, (0, 2, 4)),
        (4, (0, 1)),
        (2, (0,)),
    ],
)
def test_layers_scale_with_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    spec = dataclasses.replace(LLAVA, llm_layers=depth)
    for name in ("atp", "atp_training_free"):
        plan = vtc.create(name).plan(spec)
        assert plan.stages == tuple(layer + 1 for layer in layers)
        assert plan.needs == vtc.Needs(llm=dict.fromkeys(layers, Rows.GROUP_SUMS))
        assert plan.positions == "preserve"


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnsupportedMethod, match=r"layers=\(31,\) of 'atp' must lie before the last layer .* 0 to 30"):
        vtc.create("atp", layers=(31,)).plan(LLAVA)
    with pytest.raises(UnsupportedMethod, match="has one"):
        vtc.create("atp").plan(dataclasses.replace(LLAVA, llm_layers=1))


def test_defaults() -> None:
    shared = {
        "layers": None,
        "score_norm": "minmax",
        "strides": (2, 4, 8),
        "lambda_sample": 3.0,
        "causal_correction": False,
    }
    learned = {
        **{"feature": "pool", "bins": 256, "hidden": None, "relu": None, "temperature": 10.0, "lambda_atp": 0.05},
        **{"lambda_target": 0.2, "target_tokens": 144.0, "average": "layers", "normalise_target": False},
        **{"weights": None, "training": False},
    }
    assert dataclasses.asdict(vtc.create("atp")) == shared | learned
    free = {"mode": "budget", "spatial_share": 0.25, "shares": None, "weights": None}
    assert dataclasses.asdict(vtc.create("atp_training_free")) == shared | free
    assert vtc.create("atp", layers=[4, 14]) == vtc.create("atp", layers=(4, 14))
    assert not vtc.create("atp").needs_budget and vtc.create("atp_training_free").needs_budget
    assert vtc.create("atp").trained and not vtc.create("atp_training_free").trained


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("atp", {"layers": ()}, "are no ascending layer numbers"),
        ("atp", {"layers": (4, 4)}, "are no ascending layer numbers"),
        ("atp", {"layers": (-1, 4)}, "begin below 0"),
        ("atp", {"strides": (0, 2)}, "hold no step of at least 1"),
        ("atp", {"lambda_sample": -1.0}, "is negative; the published value is 3.0"),
        ("atp", {"score_norm": "min"}, "did you mean 'minmax'"),
        ("atp", {"feature": "pol"}, "did you mean 'pool'"),
        ("atp", {"average": "layer"}, "did you mean 'layers'"),
        ("atp", {"bins": 0}, "bins=0 must be above 0"),
        ("atp", {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ("atp_training_free", {"mode": "budgets"}, "did you mean 'budget'"),
        ("atp_training_free", {"mode": "calibrated"}, "needs constants and none were given"),
        ("atp_training_free", {"weights": "a"}, "have no use with mode='budget'"),
        ("atp_training_free", {"shares": (0.2, 0.5)}, r"do not fall within \(0, 1\]"),
        ("atp_training_free", {"shares": (0.2, 0.0)}, r"do not fall within \(0, 1\]"),
        ("atp_training_free", {"shares": (0.2,), "mode": "calibrated", "weights": "a"}, "leave one of them out"),
        ("atp_training_free", {"spatial_share": 1.5}, r"is outside \[0, 1\]"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(VTCError, match=message):
        vtc.create(name, **options)


def test_weights_and_run_must_agree(clip: Any, stored: Any) -> None:
    with pytest.raises(VTCError, match="'atp' runs on learned weights and none were given"):
        vtc.compress(clip, "atp")
    method = stored(clip, ATP(layers=(1,), bins=4, hidden=4))
    with pytest.raises(BudgetError, match="'atp' takes no retention or keep"):
        vtc.compress(clip, method, retention=0.5)
    for changed in ({"layers": (0,)}, {"feature": "mean"}, {"score_norm": "none"}, {"bins": 8}, {"lambda_sample": 2.0}):
        with pytest.raises(VTCError, match=f"were made with {next(iter(changed))}="):
            vtc.compress(clip, dataclasses.replace(method, **changed))
    spec = dataclasses.replace(adapters.of(clip).spec, llm_layers=9)
    with pytest.raises(VTCError, match="were made with num_layers='4', this run has num_layers='9'"):
        method.module(spec)
    with vtc.compress(clip, dataclasses.replace(method, temperature=99.0, target_tokens=5.0)):
        pass  # what only training reads is free


# --- on models
@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_contract(name: str, stored: Any) -> None:
    learned = stored(tiny_model(name), ATP(layers=(0, 2), bins=4, hidden=4))
    free = vtc.create("atp_training_free")
    for method, budget in ((learned, {}), (free, {"retention": 0.6})):
        failed = [d for d in check_method(method, models=[name], steps=3, **budget) if not d.passed]
        assert failed == []


def test_other_methods_may_come_first(clip: Any, stored: Any) -> None:
    """Tokens dropped before the LLM leave a smaller alive set, on the old grid."""
    method = stored(clip, ATP(layers=(1,), bins=4, hidden=4))
    inputs = tiny_inputs("llava-clip", [[4, "image", 6]])
    with vtc.compress(clip, [vtc.create("vtc_cls"), method], keep=[9, None]) as handle, torch.no_grad():
        clip(**inputs)
    kept = handle.trace[0].items[0].kept
    assert len(kept[0]) == 9 and set(kept[2].tolist()) <= set(kept[0].tolist()) and len(kept[2]) >= 1


def test_long_videos_stay_small(peak_memory: Any) -> None:
    setup = """
from vtc.methods.atp.method import ThresholdModule
from vtc.methods.atp import thresholds as t
from vtc.ops.rank import dense_rank
n = 100_000
own, cross, mask = torch.rand(1, n), torch.rand(1, n), torch.ones(1, n, dtype=torch.bool)
frame = torch.arange(n)[None] // 196
"""
    code = """
row = dense_rank((torch.arange(n)[None] % 196 // 14).float(), frame, 0.01)
col = dense_rank((torch.arange(n)[None] % 14).float(), frame, 0.01)
scaled = t.min_max(own, mask), t.min_max(cross, mask)
red, spatial = t.redundancy_score(*scaled), t.spatial_score(row, col, (2, 4, 8), 3.0)
theta = ThresholdModule(256, 256, True)(*scaled, mask)
t.hard_keep(red, spatial, *theta, mask), t.soft_keep(red, spatial, *theta, 10.0)
"""
    assert peak_memory(setup, code) < 200 * 2**20
