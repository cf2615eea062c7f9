"""FoPru against a plain ranking of patches and of rows, and against the model's own encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def plain_choice(s: list[float], place: list[tuple[int, float]], keep: int, strategy: str) -> list[int]:
    """The best patches, or those of the best rows, the last of these as far as it fits."""
    falling = sorted(range(len(s)), key=lambda j: (-s[j], j))
    if strategy == "row":
        rows = sorted(set(place))
        mean = {row: sum(v for v, p in zip(s, place, strict=True) if p == row) / place.count(row) for row in rows}
        best = sorted(rows, key=lambda row: (-round(mean[row], 7), row))
        falling = [j for row in best for j in falling if place[j] == row]
    return sorted(falling[:keep])


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["clip", "windows"])
@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("scope", ["crop", "item"])
@pytest.mark.parametrize("keep", [1, 13, 40])
def test_the_plain_choice(
    make_view: Any, kept: Any, parted: Any, shape: Any, spec: ModelSpec, strategy: Any, scope: Any, keep: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 9), (8, 8), (1, 1), shape(((1, 3, 3), (2, 6, 7)), newlines=True), shape(((3, 4, 4),))]
    numbers = [63, 64, 1, 9 + 2 * 6 * 8, 48]
    scores = [torch.rand(n, generator=generator).mul(8).round().div(1000) for n in numbers]  # with ties
    decoys = [torch.rand(n, generator=generator) for n in numbers]
    vision = {(spec.key_layer, Rows.RECEIVED): scores, (spec.key_layer - 1, Rows.RECEIVED): decoys}
    view = make_view(shapes, vision=vision, spec=spec, keep=keep)
    found = kept(view, vtc.create("fopru", strategy=strategy, scope=scope).select(view))
    for item in range(len(shapes)):
        token, crop, row = (each[item].tolist() for each in (view.items.token, view.crop, view.place[0]))
        expected: list[int] = []
        for part, few in parted(view, item, scope):
            s = [float(scores[item][token[p]]) for p in part]
            chosen = plain_choice(s, [(crop[p], row[p]) for p in part], few, strategy)
            expected += [token[part[j]] for j in chosen]
        assert found[item] == sorted(expected)


def test_a_budget_of_whole_rows_keeps_whole_rows(make_view: Any, kept: Any) -> None:
    scores = torch.tensor([[0, 9, 0], [4, 4, 4], [1, 1, 1], [3, 3, 3]]).flatten() / 100
    view = make_view([(4, 3)], vision={(22, Rows.RECEIVED): [scores]}, keep=6)
    assert kept(view, vtc.create("fopru", strategy="row").select(view)) == [[0, 1, 2, 3, 4, 5]]
    view = make_view([(4, 3)], vision={(22, Rows.RECEIVED): [scores]}, keep=4)
    assert kept(view, vtc.create("fopru", strategy="row").select(view)) == [[1, 3, 4, 5]]  # row 3 ties with row 0


def test_plans() -> None:
    assert dataclasses.asdict(vtc.create("fopru")) == {"strategy": "rank", "scope": "crop"}
    for spec, layer in ((CLIP_L, 22), (QWEN, 31)):
        plan = vtc.create("fopru").plan(spec)
        assert plan.needs == Needs(vision={layer: Rows.RECEIVED})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip"])
def test_the_kept_set_is_that_of_the_models_own_encoder(name: str, strategy: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]], seed=1, model=model)
    spec = adapters.of(model).spec
    seen: dict[str, Tensor] = {}
    tower = adapters.of(model).vision_attention[spec.key_layer]
    names = ("q_proj", "k_proj")
    hooks = [getattr(tower, n).register_forward_hook(lambda m, a, out, n=n: seen.update({n: out})) for n in names]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    query, key = (seen[each].reshape(*seen[each].shape[:2], tower.num_heads, -1).transpose(1, 2) for each in names)
    weights = (query @ key.transpose(2, 3) * tower.head_dim**-0.5).softmax(-1)
    score = weights.mean((1, 2))[:, int(spec.has_cls) :]
    with vtc.compress(model, vtc.create("fopru", strategy=strategy), keep=6) as handle:
        model(**inputs)
    for number, item in enumerate(handle.trace[0].items):
        rows = [(0, row) for row in item.layout.row.tolist()]
        assert item.kept[0].tolist() == plain_choice(score[number].tolist(), rows, 6, strategy)


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, strategy: Any, meets_budget: Callable[..., None]) -> None:
    meets_budget(name, vtc.create("fopru", strategy=strategy), 0.4)
