"""Token-level correlation against its rule, one crop and one token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.methods import token_correlation
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
THRESHOLD = 0.6


def plain_distinct(keys: Tensor, threshold: float) -> list[int]:
    """Places of the tokens that resemble none before them."""
    unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
    return [j for j in range(len(unit)) if all(float(unit[i] @ unit[j]) <= threshold for i in range(j))]


def plain_shares(total: int, weights: list[int], sizes: list[int]) -> list[int]:
    """`total` by the weights and none above its size: what a full crop cannot hold goes to the others."""
    full: set[int] = set()
    while True:
        open_ones = [g for g in range(len(sizes)) if g not in full and weights[g]]
        rest = total - sum(sizes[g] for g in full)
        exact = {g: Fraction(rest * weights[g], sum(weights[h] for h in open_ones)) for g in open_ones}
        over = [g for g in open_ones if exact[g] > sizes[g]]
        if not over:
            break
        full |= set(over)
    share = [sizes[g] if g in full else int(exact.get(g, 0)) for g in range(len(sizes))]
    for g in sorted(exact, key=lambda g: (share[g] - exact[g], g))[: total - sum(share)]:
        share[g] += 1
    return share


def plain_choice(deep: list[float], middle: list[float], keep: int, share: float) -> list[int]:
    """The best by the first layer, the best by the second, and more of the first."""
    by_deep, by_middle = (sorted(range(len(deep)), key=lambda j, s=s: (-round(s[j], 7), j)) for s in (deep, middle))
    first = int(keep * share + 0.5)
    chosen = set(by_deep[:first]) | set(by_middle[: keep - first])
    chosen |= set([j for j in by_deep if j not in chosen][: keep - len(chosen)])
    return sorted(chosen)


def seen(make_view: Any, shapes: Any, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    """A view with attention that has ties, and keys that resemble each other in some crops more than in others."""
    generator = torch.Generator().manual_seed(3)
    counts = [s.item().n_tokens if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    (deep, reading), (middle, _) = token_correlation.TokenCorrelation.readings(spec)
    scores = [[torch.rand(n, generator=generator).mul(30).round().div(999) for n in counts] for _ in range(2)]
    keys = [torch.randn(n, 4, generator=generator) + torch.linspace(0, 3, n)[:, None] for n in counts]
    vision = {(deep, reading): scores[0], (middle, reading): scores[1], (deep, Rows.KEYS): keys}
    return make_view(shapes, vision=vision, spec=spec, **budget)


def crops(view: Any, item: int) -> list[list[int]]:
    crop = view.crop[item, : view.items.counts[item]].tolist()
    return [[p for p in range(len(crop)) if crop[p] == c] for c in range(max(crop) + 1)]


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 9}, {"retention": 0.3}, {"retention": 0.8}, {}], ids=str)
def test_the_plain_choice(
    make_view: Any, kept: Any, shape: Any, monkeypatch: Any, spec: ModelSpec, share: float, budget: Any
) -> None:
    """With a budget, and with as many tokens as repeat none; in blocks of a few tokens."""
    monkeypatch.setattr(token_correlation, "BLOCK", 800)
    tiled = shape(((1, 3, 3), (2, 6, 7)), newlines=True)
    view = seen(make_view, [tiled, (5, 5), shape(((4, 3, 3),)), (1, 1), (12, 12)], spec, **budget)
    count = "budget" if budget else "density"
    found = kept(view, vtc.create("token_correlation", threshold=THRESHOLD, share=share, count=count).select(view))
    (deep, reading), (middle, _) = token_correlation.TokenCorrelation.readings(spec)
    values = [view.vision_attention(layer, reading) for layer in (deep, middle)]
    keys = view.vision_attention(deep, Rows.KEYS)
    for item, numbers in enumerate(found):
        parts = crops(view, item)
        few = [len(plain_distinct(keys[item, part], THRESHOLD)) for part in parts]
        if budget:
            few = plain_shares(view.keep[item], few, [len(part) for part in parts])
        expected: list[int] = []
        for part, keep in zip(parts, few, strict=True):
            chosen = plain_choice(*(each[item, part].tolist() for each in values), keep, share)
            expected += [int(view.items.token[item, part[j]]) for j in chosen]
        assert numbers == sorted(expected)


def test_a_crop_of_one_colour_gets_least(make_view: Any, kept: Any, shape: Any) -> None:
    """Nine alike patches are one, nine different ones are nine: of ten tokens one and nine."""
    view = seen(make_view, [shape(((2, 3, 3),))], keep=10)
    view.vision_rows[22, Rows.KEYS] = torch.cat([torch.ones(9, 9), torch.eye(9)])[None]
    (numbers,) = kept(view, vtc.create("token_correlation").select(view))
    assert len([n for n in numbers if n < 9]) == 1


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("token_correlation")) == {"threshold": 0.85, "share": 0.5, "count": "budget"}
    for spec, needs in (
        (CLIP_L, Needs({22: (Rows.KEYS, Rows.CLS), 11: (Rows.CLS,)})),
        (QWEN, Needs({31: (Rows.KEYS, Rows.RECEIVED), 23: (Rows.RECEIVED,)})),
        (dataclasses.replace(QWEN, full_attention_layers=(7, 31)), Needs({31: (Rows.KEYS, Rows.RECEIVED)})),
    ):
        plan = vtc.create("token_correlation").plan(spec)
        assert plan.needs == needs
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
    for options in ({"threshold": 1.0}, {"threshold": -0.1}, {"share": 1.5}):
        with pytest.raises(VTCError, match=r"write for example threshold=0.85, share=0.5"):
            vtc.create("token_correlation", **options)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip"])
def test_the_kept_set_is_that_of_the_models_own_encoder(name: str) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]], seed=1, model=model)
    spec = adapters.of(model).spec
    (deep, _), (middle, _) = token_correlation.TokenCorrelation.readings(spec)
    assert deep != middle
    towers = adapters.of(model).vision_attention
    seen: dict[tuple[int, str], Tensor] = {}
    hooks = [
        getattr(towers[layer], n).register_forward_hook(lambda m, a, out, at=(layer, n): seen.update({at: out}))
        for layer in (deep, middle)
        for n in ("q_proj", "k_proj")
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    scores = []
    for layer in (deep, middle):
        heads = (seen[layer, n] for n in ("q_proj", "k_proj"))
        query, key = (x.reshape(*x.shape[:2], towers[layer].num_heads, -1).transpose(1, 2) for x in heads)
        weights = (query @ key.transpose(2, 3) * towers[layer].head_dim ** -0.5).softmax(-1)
        scores.append(weights[:, :, 0, 1:].mean(1) if spec.has_cls else weights.mean((1, 2)))
    keys = seen[deep, "k_proj"][:, int(spec.has_cls) :]
    with vtc.compress(model, "token_correlation", keep=7) as handle:
        model(**inputs)
    for number, item in enumerate(handle.trace[0].items):
        assert item.kept[0].tolist() == plain_choice(*(each[number].tolist() for each in scores), 7, 0.5)
    method = vtc.create("token_correlation", threshold=0.1, count="density")
    with vtc.compress(model, method) as handle:
        model(**inputs)
    for number, item in enumerate(handle.trace[0].items):
        assert len(item.kept[0]) == len(plain_distinct(keys[number], 0.1)) < keys.shape[1]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "token_correlation", 0.4)
