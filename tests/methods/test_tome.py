"""ToMe against its steps, one group and one mean at a time: before the LLM, and after every block of a tiny encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import PRE_LLM, EncoderStage, ModelSpec
from vtc.method.parts import share
from vtc.methods.tome import KEYS, ToMe
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain import merge as plain

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def test_defaults_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("tome")) == {
        "inside": False, "r": None, "inflection": 0.0, "metric": "keys", "scope": "crop",
        "proportional": True,
    }  # fmt: skip
    refused: list[tuple[dict[str, Any], str]] = [
        ({"metric": "key"}, "unknown metric 'key'; did you mean 'keys'"),
        ({"scope": "tile"}, "unknown scope 'tile'"),
        ({"r": 16}, "r=16 counts tokens per encoder block; pass inside=True"),
        ({"r": -1, "inside": True}, "r=-1 is negative"),
        ({"r": (8, -8), "inside": True}, "is negative"),
        ({"r": 8, "inside": True, "inflection": 2.0}, r"has to lie in \[-1, 1\]"),
        ({"inside": True, "inflection": 0.5}, "needs one number r"),
    ]
    for options, message in refused:
        with pytest.raises(VTCError, match=message):
            vtc.create("tome", **options)
    assert vtc.create("tome").needs_budget
    assert not vtc.create("tome", inside=True, r=[8, 4]).needs_budget


def test_plans() -> None:
    assert ToMe().plan(CLIP_L) == vtc.Plan((PRE_LLM,), vtc.Needs({22: KEYS}), "compact")
    assert ToMe().plan(QWEN) == vtc.Plan((PRE_LLM,), vtc.Needs({31: KEYS}), "preserve")
    assert dataclasses.replace(QWEN, feature_layer=22).key_layer == 15
    assert ToMe(metric="features").plan(CLIP_L).needs == vtc.Needs()
    inside = ToMe(inside=True).plan(CLIP_L)
    assert inside.stages == tuple(EncoderStage(layer) for layer in range(1, 24))
    assert inside.needs == vtc.Needs(dict.fromkeys(range(23), KEYS))
    with pytest.raises(
        UnsupportedMethod, match="inside=True works on the patches inside the vision encoder, which this qwen2"
    ):
        ToMe(inside=True).plan(QWEN)


# --- how many after every block
def test_published_numbers() -> None:
    """16 tokens after each of CLIP-L's 23 blocks leave 208 of 576 patches."""
    assert ToMe(inside=True, r=16).steps(23, 576, None) == [[16]] * 23
    assert ToMe(inside=True).steps(23, 576, 208) == [[16]] * 23
    assert ToMe(inside=True, r=8, inflection=-1.0).steps(5, 100, None) == [[16], [12], [8], [4], [0]]
    assert ToMe(inside=True, r=8, inflection=1.0).steps(5, 100, None) == [[0], [4], [8], [12], [16]]
    assert ToMe(inside=True, r=(3, 2)).steps(4, 100, None) == [[3], [2], [0], [0]]


@given(st.integers(1, 30), st.integers(1, 800), st.data())
def test_the_budget_is_spread_evenly(blocks: int, tokens: int, data: Any) -> None:
    keep = data.draw(st.integers(1, tokens))
    steps = ToMe(inside=True).steps(blocks, tokens, keep)
    gone = [sum(plan) for plan in steps]
    assert sum(gone) == tokens - keep
    left = tokens
    for plan in steps:
        for r in plan:
            assert 0 <= r <= left // 2
            left -= r
    if all(len(plan) == 1 for plan in steps):
        assert max(gone) - min(gone) <= 1


# --- before the LLM
def plain_merge(x: Tensor, metric: Tensor, keep: int) -> dict[int, Tensor]:
    """Token that each mean stands for -> mean of all patches in it; later steps compare means of keys."""
    anchors, parts, values = list(range(len(x))), [[i] for i in range(len(x))], metric.double()
    while len(anchors) > keep:
        targets, stands = plain.decide(values, min(len(anchors) // 2, len(anchors) - keep), "similarity", 0)
        pick = [[old for old, row in enumerate(targets) if row == new] for new in range(len(stands))]
        parts = [[i for old in group for i in parts[old]] for group in pick]
        values = torch.stack([metric[group].double().mean(0) for group in parts])
        anchors = [anchors[old] for old in stands]
    return {anchor: x[group].double().mean(0).float() for anchor, group in zip(anchors, parts, strict=True)}


@pytest.mark.parametrize("budget", [{"retention": 0.25}, {"retention": 0.6}, {"keep": 6}, {"keep": 2}], ids=str)
@pytest.mark.parametrize("metric", ["keys", "features"])
def test_the_plain_means(make_view: Any, kept: Any, shape: Any, budget: Any, metric: Any) -> None:
    shapes, sizes = [(7, 9), shape(((3, 4, 5),)), (1, 1)], [[63], [20] * 3, [1]]
    generator = torch.Generator().manual_seed(2)
    keys = [torch.randn(sum(each), 8, generator=generator) for each in sizes]
    view = make_view(shapes, vision={(22, KEYS): keys}, **budget)
    selection = ToMe(metric=metric).select(view)
    assert selection is not None
    numbers = kept(view, selection)
    for item, groups in enumerate(sizes):
        keep = view.budget.tokens(sum(groups))
        groups = groups if keep >= len(groups) else [sum(groups)]
        first, expected = 0, dict[int, Tensor]()
        for size, count in zip(groups, share(keep, groups), strict=True):
            own = slice(first, first + size)
            values = keys[item] if metric == "keys" else view.tokens[item]
            means = plain_merge(view.tokens[item, own], values[own], count)
            expected |= {first + place: mean for place, mean in means.items()}
            first += size
        assert numbers[item] == sorted(expected)
        for place, mean in expected.items():
            assert torch.allclose(selection.tokens[item, place], mean, atol=1e-5)
        assert selection.merged_into[item, numbers[item]].tolist() == numbers[item]


# --- inside the encoder
def plain_encoder(model: Any, pixels: Tensor, plans: list[list[int]], has_cls: bool, proportional: bool) -> Tensor:
    """[k, D] features of one image after merging behind every block, the class token in front and untouched.

    proportional: later blocks add the log of the sizes to the logits of their keys.
    """
    adapter = adapters.of(model)
    layers, attention = list(adapter.vision_layers), list(adapter.vision_attention)
    seen: dict[str, Tensor] = {}
    hooks = [layers[0].register_forward_pre_hook(lambda m, args, kw: seen.__setitem__("x", args[0]), with_kwargs=True)]
    with torch.no_grad():
        model.model.get_image_features(pixels, return_dict=True)
    hooks[0].remove()
    x, sizes = seen["x"], torch.ones(seen["x"].shape[1]).tolist()
    origin = list(range(x.shape[1]))
    for block, plan in enumerate(plans):
        hook = attention[block].k_proj.register_forward_hook(lambda m, args, out: seen.__setitem__("k", out))
        with torch.no_grad():
            bias = torch.tensor(sizes).log()[None, None, None] if proportional else None
            x = layers[block](x, attention_mask=bias)
        hook.remove()
        metric = seen["k"][0].unflatten(-1, (attention[block].num_heads, -1)).mean(1).double()
        for r in plan:
            targets, stands = plain.decide(metric, r, "index" if has_cls else "similarity", int(has_cls))
            pick = [[old for old, row in enumerate(targets) if row == new] for new in range(len(stands))]
            weights = [torch.tensor([sizes[old] for old in group]) for group in pick]
            shares = [w[:, None] / w.sum() for w in weights]
            x = torch.stack([(x[0, group] * w).sum(0) for group, w in zip(pick, shares, strict=True)])[None]
            metric = torch.stack([(metric[group] * w).sum(0) for group, w in zip(pick, shares, strict=True)])
            sizes, origin = [float(w.sum()) for w in weights], [origin[old] for old in stands]
    rows = sorted(range(len(origin)), key=origin.__getitem__)
    return x[0, rows[int(has_cls) :]]


@pytest.mark.parametrize(("name", "has_cls"), [("llava-clip", True), ("llava-siglip", False)])
@pytest.mark.parametrize("keep", [9, 5, 2])
@pytest.mark.parametrize("proportional", [True, False])
def test_merging_behind_every_block(name: str, has_cls: bool, keep: int, proportional: bool, limits: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[3, "image", 5]], model=model)
    spec = adapters.of(model).spec
    count = int((inputs["input_ids"] == model.config.image_token_id).sum())
    method = ToMe(inside=True, proportional=proportional)
    plans = method.steps(spec.feature_layer + 1, count, keep)
    features = plain_encoder(model, inputs["pixel_values"], plans, has_cls, proportional)
    with torch.no_grad():
        expected = model.model.multi_modal_projector(features[None])[0]
    rows: list[Tensor] = []
    first = model.model.language_model.layers[0]
    first.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), vtc.compress(model, method, keep=keep) as handle:
        model(**inputs)
    assert handle.stats.calls[0].visual_tokens_kept == (float(keep),)
    assert float((rows[0][0, 3 : 3 + keep] - expected).abs().max()) <= limits.hidden


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("retention", [0.3, 0.8])
def test_the_request_is_met(name: str, retention: float) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3], [2, kind, 12]], seed=3, model=model)
        with torch.no_grad(), vtc.compress(model, "tome", retention=retention) as handle:
            model(**inputs)
        call = handle.stats.calls[0]
        for before, mean in zip(call.visual_tokens_in, call.visual_tokens_kept, strict=True):
            assert abs(mean - vtc.tokens_to_keep(before, retention)) <= 1


def test_everything_stays_when_nothing_merges(make_view: Any) -> None:
    view = make_view([(3, 3)], keep=100)
    assert ToMe(metric="features").select(view) is None
