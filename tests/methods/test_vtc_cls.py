"""VTC-CLS against its equations, one patch at a time, and against the model's own eager attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Rows
from vtc.methods.vtc_cls import ensemble
from vtc.testing import tiny_inputs, tiny_model

SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
INTERN = ModelSpec("internvl", 24, 23, True, tuple(range(24)), 28)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
SHAPES = [(7, 9), (24, 24), (1, 1), (2, 3), (24, 24)]
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
}


def attention(patches: int, layers: int, seed: int, heads: int = 4) -> Tensor:
    """[L, H, 1 + N, 1 + N] softmax attention of an encoder with a class token at place 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, heads, 1 + patches, 1 + patches, generator=generator).mul(2).softmax(-1)


def plain_scores(weights: Tensor, reduction: str = "sum") -> list[float]:
    """s[j] = sum over l of (1 / H) * sum over h of A_l[h, 0, 1 + j], over the window's [layers, H, 1 + N, 1 + N]."""
    rows = weights[:, :, 0].double().tolist()
    patches = len(rows[0][0]) - 1
    means = [[sum(head[1 + j] for head in layer) / len(layer) for layer in rows] for j in range(patches)]
    return [REDUCE[reduction](values) for values in means]


def plain_choice(scores: list[float], keep: int) -> list[int]:
    """The U highest scores, the lower index first among equals, in raster order."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[: min(keep, len(scores))])


# --- the equations
@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 64}, {"retention": 1 / 9}, {"keep": 10**4}], ids=str)
def test_the_plain_choice(make_view: Any, kept: Any, reduction: Any, budget: Any) -> None:
    weights = [attention(height * width, 3, seed) for seed, (height, width) in enumerate(SHAPES)]
    vision = {20 + k: [w[k].mean(0)[0, 1:] for w in weights] for k in range(3)}
    decoys = {layer: [torch.rand_like(row) for row in vision[20]] for layer in (19, 23)}
    view = make_view(SHAPES, vision=vision | decoys, **budget)
    found = kept(view, vtc.create("vtc_cls", reduction=reduction).select(view))
    for item, numbers in enumerate(found):
        scores = plain_scores(weights[item], reduction)
        assert numbers == plain_choice(scores, view.budget.tokens(len(scores)))


def test_scores_are_summed_in_float32() -> None:
    rows = [torch.rand(2, 63) for _ in range(3)]
    expected = [[sum(r[i, j].item() for r in rows) for j in range(63)] for i in range(2)]
    found = ensemble([row.bfloat16() for row in rows])
    assert found.dtype == torch.float32
    exact = ensemble(rows)
    assert torch.allclose(exact, torch.tensor(expected), atol=1e-6)
    assert torch.equal(ensemble(rows, "mean") * 3, exact) or torch.allclose(ensemble(rows, "mean") * 3, exact)
    assert torch.equal(ensemble(rows, "max"), torch.stack(rows).max(0).values)
    assert torch.equal(ensemble(rows, "min"), torch.stack(rows).min(0).values)


def test_sum_and_mean_rank_alike_and_the_others_do_not(make_view: Any, kept: Any) -> None:
    weights = attention(576, 3, 0)
    vision = {20 + k: [weights[k].mean(0)[0, 1:]] for k in range(3)}
    view = make_view([(24, 24)], vision=vision, keep=128)
    sets = {r: kept(view, vtc.create("vtc_cls", reduction=r).select(view))[0] for r in REDUCE}
    assert sets["sum"] == sets["mean"]
    assert len({tuple(s) for s in sets.values()}) == 3


def test_equal_scores_go_to_the_lower_index(make_view: Any, kept: Any) -> None:
    row = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.2, 0.2])
    view = make_view([(2, 3)], vision={20: [row], 21: [row], 22: [row]}, keep=3)
    assert kept(view, vtc.create("vtc_cls").select(view))[0] == [1, 2, 3]


@pytest.mark.parametrize("scope", ["crop", "item"])
def test_crops_are_ranked_apart_or_together(make_view: Any, kept: Any, shares: Any, shape: Any, scope: Any) -> None:
    shapes = [shape(((1, 3, 3), (2, 2, 7)), newlines=True), (5, 5)]
    counts = [9 + 28 + 4, 25]
    generator = torch.Generator().manual_seed(0)
    vision = {layer: [torch.rand(n, generator=generator) for n in counts] for layer in (20, 21, 22)}
    view = make_view(shapes, vision=vision, keep=14)
    found = kept(view, vtc.create("vtc_cls", scope=scope).select(view))
    for item, layout in enumerate(view.items.layouts):
        scores = [sum(vision[layer][item][j].item() for layer in vision) for j in range(layout.n_tokens)]
        real = [j for j in range(layout.n_tokens) if not layout.newline[j]]
        groups = (
            [real] if scope == "item" else [[j for j in real if layout.crop[j] == c] for c in range(layout.n_crops)]
        )
        share = shares(view.keep[item], [len(group) for group in groups])
        chosen = [
            [group[i] for i in plain_choice([scores[j] for j in group], n)]
            for group, n in zip(groups, share, strict=True)
        ]
        assert found[item] == sorted(j for group in chosen for j in group)


# --- the window of layers
def clip_l(**changes: Any) -> ModelSpec:
    return dataclasses.replace(ModelSpec("llava", 24, 22, True, tuple(range(24)), 32), **changes)


@pytest.mark.parametrize(
    ("options", "spec", "window"),
    [
        ({}, clip_l(), (20, 21, 22)),  # the paper's K = 3, never the last layer
        ({"start_layer": 16}, clip_l(), tuple(range(16, 23))),  # the released scripts' default
        ({"start_layer": 22}, clip_l(), (22,)),
        ({"layers": 7}, clip_l(), tuple(range(16, 23))),
        ({"layers": 1}, clip_l(), (22,)),
        ({"layers": 99}, clip_l(), tuple(range(23))),
        ({}, clip_l(feature_layer=12), (10, 11, 12)),  # features from another layer
        ({}, clip_l(vision_layers=4, feature_layer=1), (0, 1)),
        ({}, INTERN, (21, 22, 23)),
        ({}, SIGLIP, (24, 25, 26)),
        ({}, QWEN, (15, 23, 31)),
        ({"layers": 1}, QWEN, (31,)),
        ({"start_layer": 20}, QWEN, (23, 31)),
    ],
)
def test_the_window_ends_at_the_feature_layer(options: Any, spec: ModelSpec, window: tuple[int, ...]) -> None:
    method = vtc.create("vtc_cls", **options)
    assert method.window(spec) == window
    rows = Rows.CLS if spec.has_cls else Rows.RECEIVED
    assert method.plan(spec).needs == vtc.Needs(vision=dict.fromkeys(window, rows))


@pytest.mark.parametrize("start", [-1, 23, 40])
def test_windows_without_layers_are_refused(clip: Any, start: int) -> None:
    method = vtc.create("vtc_cls", start_layer=start)
    with pytest.raises(UnsupportedMethod, match=rf"start_layer={start} is not among the encoder layers 0 to 22"):
        method.plan(clip_l())
    with pytest.raises(UnsupportedMethod, match=rf"start_layer={start} .* layers 0 to 2 .* this llava model"):
        vtc.compress(clip, method, retention=0.5)


def test_positions_follow_the_released_code() -> None:
    assert vtc.create("vtc_cls").plan(clip_l()).positions == "compact"
    assert vtc.create("vtc_cls").plan(QWEN).positions == "preserve"
    assert vtc.create("vtc_cls").plan(clip_l()).stages == (vtc.PRE_LLM,)


def test_defaults_and_refusals() -> None:
    method = vtc.create("vtc_cls")
    assert dataclasses.asdict(method) == {"layers": 3, "start_layer": None, "reduction": "sum", "scope": "crop"}
    with pytest.raises(VTCError, match=r"unknown reduction 'men'; did you mean .*'mean'"):
        vtc.create("vtc_cls", reduction="men")
    with pytest.raises(VTCError, match="layers=0 leaves no attention to rank by; pass at least 1, the paper uses 3"):
        vtc.create("vtc_cls", layers=0)
    with pytest.raises(VTCError, match="unknown scope 'tile'"):
        vtc.create("vtc_cls", scope="tile")


# --- on models
LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@torch.no_grad()
def eager_rows(name: str, pixels: Tensor) -> Tensor:
    """[layers, crops, N] what the class token pays to each patch, or what each patch receives where there is none."""
    model = tiny_model(name, attn_implementation="eager")
    seen: dict[Any, Tensor] = {}
    for module in adapters.of(model).vision_attention:
        module.register_forward_hook(lambda module, args, output: seen.__setitem__(module, output[1]))
    model.model.get_image_features(pixels, return_dict=True)
    weights = torch.stack([seen[module] for module in adapters.of(model).vision_attention])
    if name == "llava-clip":
        return weights.mean(2)[:, :, 0, 1:]
    return weights.mean((2, 3))  # the mean over heads and queries


@pytest.mark.parametrize(
    ("name", "options", "window"),
    [
        ("llava-clip", {}, (0, 1, 2)),
        ("llava-clip", {"layers": 1}, (2,)),
        ("llava-clip", {"start_layer": 1, "reduction": "max"}, (1, 2)),
        ("llava-siglip", {}, (1, 2, 3)),
        ("llava-siglip", {"layers": 1}, (3,)),
        ("llava-siglip", {"start_layer": 0, "reduction": "min"}, (0, 1, 2, 3)),
    ],
)
@pytest.mark.parametrize("keep", [1, 4, 15])
def test_the_kept_set_is_that_of_eager_attention(name: str, options: Any, window: Any, keep: int) -> None:
    inputs = tiny_inputs(name, LAYOUT, seed=2)
    rows = eager_rows(name, inputs["pixel_values"])
    model = tiny_model(name)
    with vtc.compress(model, "vtc_cls", keep=keep, **options) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    reduce = REDUCE[options.get("reduction", "sum")]
    for item, record in enumerate(handle.trace[0].items):
        scores = [reduce([rows[layer, item, j].item() for layer in window]) for j in range(16)]
        ranked = sorted(scores, reverse=True)
        assert ranked[keep - 1] - ranked[keep] > 1e-6  # no tie that rounding could turn
        assert record.kept[0].tolist() == plain_choice(scores, keep)


def test_windows_matter() -> None:
    """Other layers give other sets, so the test above would notice a window off by one."""
    model, inputs = tiny_model("llava-clip"), tiny_inputs("llava-clip", LAYOUT, seed=2)
    sets = set()
    for start in range(3):
        with vtc.compress(model, "vtc_cls", keep=4, start_layer=start) as handle, torch.no_grad():
            model(**inputs)
        sets.add(tuple(tuple(item.kept[0].tolist()) for item in handle.trace[0].items))
    assert len(sets) == 3


def test_the_llm_gets_the_survivors_in_raster_order(clip: Any, limits: Any) -> None:
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    rows: list[Tensor] = []
    with torch.no_grad(), vtc.compress(clip, "vtc_cls", keep=5) as handle:
        clip.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        logits = clip(**inputs).logits[:, -1]
    with torch.no_grad():
        features = clip.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        text = clip.get_input_embeddings()(inputs["input_ids"])[0]
        short = torch.cat([text[:3], features[handle.trace[0].items[0].kept[0]], text[-5:]])[None]
        native = clip(inputs_embeds=short).logits[:, -1]
    assert float((rows[0] - short).abs().max()) <= limits.hidden
    assert float((logits - native).abs().max()) <= limits.logits
