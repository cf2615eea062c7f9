"""VisPruner against its rule, one round and one token at a time, and against the model's own encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.methods.vispruner import diverse
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT
from vtc.testing.measures import ties

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
SHAPES = [(7, 9), (8, 8), (1, 1), (2, 3), (12, 12)]


def plain_choice(s: list[float], features: Tensor, keep: int, share: float) -> list[int]:
    """Important tokens, then the list of the others, round by round."""
    order = sorted(range(len(s)), key=lambda j: (-s[j], j))
    important = order[: int(keep * share)]
    if not keep or share == 1:
        return sorted(important)
    rest, unit = order[len(important) :], features.double() / features.double().norm(dim=1, keepdim=True)
    while len(rest) > keep - len(important):
        r = min(8, len(rest) - (keep - len(important)), len(rest) // 2)
        a, b = rest[0::2], rest[1::2]
        highest = [max(round(float(unit[i] @ unit[j]), 9) for j in b) for i in a]
        falling = sorted(range(len(a)), key=lambda n: (-highest[n], n))
        rest = [a[n] for n in falling[r:]] + b
    return sorted(important + rest)


def seen(make_view: Any, shapes: Any = SHAPES, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    """A view with attention that has ties, and the encoder's features."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    scores = [torch.rand(n, generator=generator).mul(40).round().div(1000) for n in counts]
    features = [torch.randn(n, 8, generator=generator) for n in counts]
    layer = spec.key_layer
    return make_view(
        shapes, vision={(layer, spec.patch_attention): scores, (layer, Rows.HIDDEN): features}, spec=spec, **budget
    )


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 9}, {"keep": 40}, {"retention": 0.3}], ids=str)
def test_the_plain_choice(make_view: Any, kept: Any, spec: ModelSpec, share: float, budget: Any) -> None:
    view = seen(make_view, spec=spec, **budget)
    found = kept(view, vtc.create("vispruner", share=share).select(view))
    scores, features = (view.vision_attention(spec.key_layer, each) for each in (spec.patch_attention, Rows.HIDDEN))
    for item, count in enumerate(view.items.counts):
        s = scores[item, :count].tolist()
        assert found[item] == plain_choice(s, features[item, :count], view.keep[item], share)


@pytest.mark.parametrize("scope", ["crop", "item"])
def test_crops_choose_apart_or_together(make_view: Any, kept: Any, shares: Any, shape: Any, scope: Any) -> None:
    shapes = [shape(((1, 3, 3), (2, 6, 7)), newlines=True), (5, 5), shape(((6, 3, 3),)), shape(((9, 2, 2),))]
    view = seen(make_view, shapes, keep=6)
    found = kept(view, vtc.create("vispruner", scope=scope).select(view))
    for item, numbers in enumerate(found):
        count = view.items.counts[item]
        crop = view.crop[item, :count].tolist()
        parts = [[p for p in range(count) if scope == "item" or crop[p] == c] for c in range(max(crop) + 1)]
        parts = parts[:1] if scope == "item" else parts
        expected: list[int] = []
        for part, keep in zip(parts, shares(view.keep[item], [len(part) for part in parts]), strict=True):
            s, x = (view.vision_attention(22, each)[item, part] for each in (Rows.CLS, Rows.HIDDEN))
            expected += [int(view.items.token[item, part[j]]) for j in plain_choice(s.tolist(), x, keep, 0.5)]
        assert numbers == sorted(expected)


def test_of_duplicates_one_stays(make_view: Any, kept: Any) -> None:
    """Thirty-two directions, each twice side by side in the list: one of each remains."""
    unit = torch.eye(32).repeat_interleave(2, 0)
    scores = torch.linspace(1, 0.1, 64)
    view = make_view([(8, 8)], vision={(22, Rows.CLS): [scores], (22, Rows.HIDDEN): [unit]}, keep=56)
    (numbers,) = kept(view, vtc.create("vispruner", share=0.0).select(view))
    assert len({number // 2 for number in numbers}) == 32


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("vispruner")) == {"share": 0.5, "scope": "crop"}
    for spec, layer in ((CLIP_L, 22), (QWEN, 31)):
        plan = vtc.create("vispruner").plan(spec)
        assert plan.needs == Needs(vision={layer: (spec.patch_attention, Rows.HIDDEN)})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
    with pytest.raises(VTCError, match=r"share=1.5 is no part of the tokens; the paper uses 0.5 and 0.75"):
        vtc.create("vispruner", share=1.5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip"])
def test_the_kept_set_is_that_of_the_models_own_encoder(name: str) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]], seed=1, model=model)
    spec = adapters.of(model).spec
    seen: dict[str, Tensor] = {}
    tower = adapters.of(model).vision_attention[spec.key_layer]
    names = ("q_proj", "k_proj")
    hooks = [getattr(tower, n).register_forward_hook(lambda m, a, out, n=n: seen.update({n: out})) for n in names]
    layer = adapters.of(model).vision_layers[spec.key_layer]
    hooks.append(
        layer.register_forward_hook(lambda m, a, out: seen.update(x=out[0] if isinstance(out, tuple) else out))
    )
    model(**inputs)
    for hook in hooks:
        hook.remove()
    query, key = (seen[each].reshape(*seen[each].shape[:2], tower.num_heads, -1).transpose(1, 2) for each in names)
    weights = (query @ key.transpose(2, 3) * tower.head_dim**-0.5).softmax(-1)
    score = weights[:, :, 0, 1:].mean(1) if spec.has_cls else weights.mean((1, 2))
    features = seen["x"][:, int(spec.has_cls) :]
    with vtc.compress(model, "vispruner", keep=7) as handle:
        model(**inputs)
    for number, item in enumerate(handle.trace[0].items):
        assert item.kept[0].tolist() == plain_choice(score[number].tolist(), features[number], 7, 0.5)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "vispruner", 0.4)


@torch.no_grad()
def test_duplicates_leave_in_an_order_that_rounding_does_not_decide() -> None:
    """On blank pictures of Qwen2.5-VL the cosine of two like patches depends, in its last bit, on the batch."""
    model = tiny_model("qwen2.5-vl")
    assert ties(model, "qwen2.5-vl", lambda one: vtc.compress(one, "vispruner", retention=0.7)) < LIMIT


@pytest.mark.parametrize("seed", range(6))
def test_equal_duplicates_leave_in_the_order_of_the_list(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ones = torch.randn(1, 24, 96, generator=generator)
    scaled = ones * (0.3 + 3 * torch.rand(1, 24, 1, generator=generator))  # the same direction, up to rounding
    features = torch.stack([ones, scaled], 2).view(1, 48, 96)
    order = diverse(features, torch.arange(48)[None], [48], [40])
    assert sorted(order[0, :40].tolist()) == [*range(1, 16, 2), *range(16, 48)]
