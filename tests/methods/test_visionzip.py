"""VisionZip against a plain loop over crops and tokens, and on models before the LLM and before the projector."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec, Needs, Rows
from vtc.methods.visionzip.method import MEAN_KEYS, longest
from vtc.ops.nearest import nearest_target
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
NEXT = dataclasses.replace(CLIP_L, family="llava-next", single_crop=False)
SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 29), 36, mrope=True)

SHAPES = {
    "square": ((1, 5, 5),),
    "wide": ((1, 3, 11),),
    "one token": ((1, 1, 1),),
    "tiles": ((4, 3, 3),),
    "frames": ((7, 2, 5),),
    "two rasters": ((1, 4, 4), (2, 3, 5)),
}


def plain_visionzip(
    score: list[float], metric: Tensor, x: Tensor, crops: list[list[int]], counts: list[int], share: float
) -> tuple[list[int], list[int], dict[int, Tensor]]:
    """Dominant tokens, targets, and the row of each kept token."""
    dominant: list[int] = []
    targets: list[int] = []
    rows: dict[int, Tensor] = {}
    for crop, k in zip(crops, counts, strict=True):
        best = sorted(crop, key=lambda j: (-score[j], j))[: math.floor(k * share + 0.5)]
        rest = [j for j in crop if j not in best]
        wanted = k - len(best)
        mine = rest[:: max(1, len(rest) // wanted)][:wanted] if wanted else []
        groups: dict[int, list[Tensor]] = {t: [] for t in mine}
        for j in (j for j in rest if j not in mine and mine):
            cosine = [float(torch.cosine_similarity(metric[j], metric[t], dim=0)) for t in mine]
            groups[mine[max(range(len(mine)), key=lambda t: (round(cosine[t], 6), -t))]].append(x[j])
        rows |= {j: x[j] for j in best}
        rows |= {t: x[t] + torch.stack(given).mean(0) if given else x[t] for t, given in groups.items()}
        dominant, targets = dominant + best, targets + mine
    return sorted(dominant), sorted(targets), rows


def vision_of(items: list[int], seed: int, spec: ModelSpec = CLIP_L, ties: bool = False) -> dict[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    layer = spec.feature_layer if spec is not QWEN else 29
    scores = [torch.randn(n, generator=generator) for n in items]
    scores = [each.round() for each in scores] if ties else scores
    keys = [torch.randn(n, 4, generator=generator) for n in items]
    return {(layer, Rows.CLS if spec.has_cls else Rows.RECEIVED): scores, (layer, MEAN_KEYS): keys}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixtures hand over functions only
@given(
    names=st.lists(st.sampled_from(list(SHAPES)), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    share=st.sampled_from([54 / 64, 0.5, 0.1, 1.0]),
    ties=st.booleans(),
    spec=st.sampled_from([CLIP_L, SIGLIP, QWEN]),
    budget=st.sampled_from([{"keep": 1}, {"keep": 4}, {"keep": 13}, {"retention": 0.3}, {"retention": 0.95}]),
)
def test_the_plain_choice(
    make_view: Any, kept: Any, shares: Any, shape: Any, names: Any, seed: int, share: float, ties: bool, spec: Any,
    budget: Any,
) -> None:  # fmt: skip
    shapes = [shape(SHAPES[name], newlines=name == "two rasters") for name in names]
    layouts = [each.item() for each in shapes]
    vision = vision_of([layout.n_tokens for layout in layouts], seed, spec, ties)
    view = make_view(shapes, vision=vision, spec=spec, seed=seed, **budget)
    selection = vtc.create("visionzip", share=share).select(view)
    found = kept(view, selection)
    scores, keys = vision.values()
    for item, layout in enumerate(layouts):
        real = view.items.token[item][view.items.mask[item]].tolist()
        at = {token: place for place, token in enumerate(real)}
        x = torch.zeros(layout.n_tokens, view.tokens.shape[2])
        x[real] = view.tokens[item, : len(real)]
        crops = [[j for j in real if layout.crop[j] == c] for c in range(layout.n_crops)]
        counts = shares(view.keep[item], [len(crop) for crop in crops])
        best, targets, rows = plain_visionzip(scores[item].tolist(), keys[item], x, crops, counts, share)
        assert found[item] == sorted(best + targets)
        assert len(found[item]) == view.keep[item]
        for token, row in rows.items():
            assert torch.allclose(selection.tokens[item, at[token]], row, atol=1e-5)
            assert selection.merged_into[item, at[token]] == at[token]
        lost = selection.merged_into[item, [at[j] for j in real if j not in rows]].tolist()
        assert all(place == -1 or real[place] in targets for place in lost)


def test_the_papers_budgets(make_view: Any) -> None:
    """192 = 162 + 30, 128 = 108 + 20, 64 = 54 + 10."""
    view = make_view([(24, 24)], vision=vision_of([576], 0), keep=64)
    for keep, contextual in ((192, 30), (128, 20), (64, 10)):
        again = make_view([(24, 24)], vision=vision_of([576], 0), keep=keep)
        selection = vtc.create("visionzip").select(again)
        changed = (selection.tokens != again.tokens).any(2) & selection.keep
        assert int(changed.sum()) == contextual
    assert view.keep == (64,)


def test_the_released_order(make_view: Any, shape: Any) -> None:
    """Thumbnail, its contextual tokens, the tiles' dominant ones, their contextual ones; no newlines."""

    class Tiled(shape):
        def item(self) -> Any:
            return dataclasses.replace(super().item(), thumbnail=0, tiling=(1, 2))

    shapes = [Tiled(((1, 4, 4), (2, 4, 4)), newlines=True), shape(((1, 5, 5),))]
    vision = vision_of([56, 25], 3)
    method = vtc.create("visionzip", share=0.5, layout="official")
    view = make_view(shapes, vision=vision, keep=24)
    selection = method.select(view)
    assert selection.separators is False
    assert selection.counts == (24, 24)  # newlines no longer count
    assert view.keep == (16, 24)
    plain = vtc.create("visionzip", share=0.5).select(make_view(shapes, vision=vision, keep=32))  # 24 and 8 newlines
    assert plain.counts == (24, 25)
    crops = [[j for j in range(48) if view.crop[0, j] == c] for c in range(3)]
    score, metric = view.vision_attention(22, Rows.CLS), view.vision_attention(22, MEAN_KEYS)
    best, targets, rows = plain_visionzip(score[0].tolist(), metric[0], view.tokens[0], crops, [8, 8, 8], 0.5)
    order = [j for tile in (False, True) for kind in (best, targets) for j in kind if (j >= 16) == tile]
    expected = torch.stack([rows[j] for j in order])
    assert torch.allclose(selection.tokens[0][selection.keep[0]], expected, atol=1e-5)
    into = selection.merged_into[0]
    assert torch.equal(into[order], selection.keep[0].nonzero().flatten())
    assert torch.equal(into >= 0, plain.merged_into[0] >= 0)


def test_crops_are_never_longer_than_said(shape: Any) -> None:
    for regions, bound in ((((1, 5, 6),), 30), (((4, 3, 2),), 6), (((1, 2, 2), (2, 2, 3)), 16)):
        assert longest(shape(regions).item()) == bound


def test_long_videos_stay_small(peak_memory: Any) -> None:
    """Half of 65,536 tokens of one crop: 2^28 similarities and rows of 128 MiB pass in blocks."""
    setup = "\n".join(
        [
            "from vtc.methods.visionzip.contextual import *",
            "from vtc.ops.nearest import nearest_target",
            "keys, x = torch.randn(1, 65536, 8), torch.ones(1, 65536, 512)",
            "mask = torch.ones(1, 65536, dtype=torch.bool)",
            "counts = torch.tensor([28672]), torch.tensor([4096])",
        ]
    )
    code = "\n".join(
        [
            "best, target = dominant_and_targets(keys[..., 0], *counts, mask)",
            "add_mean(x, nearest_target(keys, target, ~best, 4096), target, 4096)",
        ]
    )
    assert peak_memory(setup, code) < 900 * 2**20


# --- plans
def test_plans() -> None:
    method = vtc.create("visionzip")
    for spec, layer, attention in ((CLIP_L, 22, Rows.CLS), (SIGLIP, 26, Rows.RECEIVED), (QWEN, 29, Rows.RECEIVED)):
        plan = method.plan(spec)
        assert plan.needs == Needs(vision={layer: (attention, MEAN_KEYS)})
        assert plan.stages == (vtc.PRE_LLM,)
        assert plan.positions == ("preserve" if spec.mrope else "compact")
    assert vtc.create("visionzip", before="projector").plan(CLIP_L).stages == (EncoderStage(23),)
    for spec in (NEXT, QWEN):
        with pytest.raises(UnsupportedMethod, match=rf"before='projector' merges .* {spec.family} .* use before='llm'"):
            vtc.create("visionzip", before="projector").plan(spec)


def test_defaults_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("visionzip")) == {"share": 54 / 64, "before": "llm", "layout": "raster"}
    for options, message in (
        ({"share": 0}, r"share=0.0 is outside \(0, 1\]; it is the dominant part, the paper's is 54/64"),
        ({"before": "projektor"}, r"unknown before 'projektor'; did you mean .*'projector'"),
        ({"layout": "rastr"}, r"unknown layout 'rastr'; did you mean .*'raster'"),
    ):
        with pytest.raises(VTCError, match=message):
            vtc.create("visionzip", **options)


# --- on models
LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip"])
@pytest.mark.parametrize("before", ["llm", "projector"])
def test_the_rows_that_reach_the_llm(name: str, before: Any, limits: Any) -> None:
    """From the model's own keys and attention; the projector comes before or behind the merging."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUT, model=model)
    adapter = adapters.of(model)
    layer, prefix = adapter.spec.feature_layer, int(adapter.spec.has_cls)
    tower = adapter.vision_attention[layer]
    seen: dict[str, Any] = {}
    hooks = [
        tower.k_proj.register_forward_hook(lambda module, args, output: seen.__setitem__("key", output)),
        tower.q_proj.register_forward_hook(lambda module, args, output: seen.__setitem__("query", output)),
    ]
    hooks.append(adapter.projector.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0])))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    query, key = (seen[each].unflatten(2, (tower.num_heads, -1)).transpose(1, 2) for each in ("query", "key"))
    weights = (query @ key.transpose(2, 3) * tower.head_dim**-0.5).softmax(-1)
    score = weights[:, :, 0, 1:].mean(1) if prefix else weights.mean((1, 2))
    metric, features = key.mean(1)[:, prefix:], seen["x"]
    features = features if features.shape[1] == score.shape[1] else features[:, prefix:]
    project = adapter.projector
    entered: list[Tensor] = []
    hook = adapter.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with vtc.compress(model, "visionzip", keep=7, before=before) as handle:
        hook.remove()
        hook = adapter.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        model(**inputs)
    hook.remove()
    for number, item in enumerate(handle.trace[0].items):
        x = features[number] if before == "projector" else project(features[number : number + 1])[0]
        everything = [list(range(score.shape[1]))]
        best, targets, rows = plain_visionzip(score[number].tolist(), metric[number], x, everything, [7], 54 / 64)
        assert (len(best), len(targets)) == (6, 1)
        assert item.kept[0].tolist() == sorted(rows)
        expected = torch.stack([rows[j] for j in sorted(rows)])
        expected = project(expected[None])[0] if before == "projector" else expected
        distance = (entered[0][item.row][None] - expected[:, None]).abs().amax(2).amin(1)
        assert float(distance.max()) <= limits.hidden


@pytest.mark.parametrize("options", [{}, {"layout": "official"}, {"before": "projector"}], ids=str)
def test_gradients_reach_the_encoder_through_every_token(options: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3]], model=model)
    pixels = inputs["pixel_values"].requires_grad_()
    with vtc.compress(model, "visionzip", keep=4, **options):
        model(**inputs).logits[:, -1].sum().backward()
    patch = model.config.vision_config.patch_size
    blocks = pixels.grad[0].abs().amax(0).unfold(0, patch, patch).unfold(1, patch, patch)
    assert bool((blocks.amax((2, 3)) > 0).all())


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("options", [{}, {"layout": "official"}, {"before": "projector"}], ids=str)
def test_the_budget_is_met(name: str, options: Any) -> None:
    model = tiny_model(name)
    spec = adapters.of(model).spec
    if "before" in options and not (spec.encoder_stages and spec.single_crop):
        with pytest.raises(UnsupportedMethod, match="use before='llm'"):
            vtc.compress(model, "visionzip", retention=0.5, **options)
        return
    for retention in (0.4, 0.7):
        for kind in TINY_MODELS[name].kinds:
            inputs = tiny_inputs(name, [[4, kind, 6], [2, kind, 9, kind, 3]], model=model)
            with vtc.compress(model, "visionzip", retention=retention, **options) as handle:
                model(**inputs)
            wanted = [0, 0]
            for item in handle.trace[0].items:
                wanted[item.row] += vtc.tokens_to_keep(len(item.positions), retention)
            assert list(handle.stats.calls[0].visual_tokens_kept) == wanted


@pytest.mark.parametrize(("angle", "target"), [(0.0995, 0), (0.1005, 1)])
def test_the_nearer_of_two_targets_that_lie_close(angle: float, target: int) -> None:
    """Two angles whose cosines differ by a ten-thousandth; only equal ones go to the lower target."""
    angles = torch.tensor([[0.0, 0.2, angle]])
    metric = torch.stack([angles.cos(), angles.sin()], dim=-1)
    marks, left = torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool)
    assert nearest_target(metric, marks, left, 2).tolist() == [[0, 1, target]]
