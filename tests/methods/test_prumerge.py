"""PruMerge and PruMerge+ against their rules, one crop and one token at a time, and against the model's own encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.methods import prumerge
from vtc.methods.prumerge import ONE_HEAD
from vtc.ops.select import outliers
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
SHAPES = [(7, 9), (8, 8), (1, 1), (2, 3), (1, 2)]


def ranked(values: list[float], among: list[int]) -> list[int]:
    return sorted(among, key=lambda j: (-values[j], j))


def plain_rows(
    x: Tensor, a: list[float], keys: Tensor, best: list[int], others: list[int], neighbours: int
) -> tuple[dict[int, Tensor], list[int]]:
    """The rows by their places, and the places in the order of the released code; best, others: what is kept."""
    unit = keys.double() / keys.double().norm(dim=1, keepdim=True)
    like = (unit @ unit.T).tolist()
    every, rows = range(len(x)), {}
    for i in best + others:
        near = sorted((j for j in every if j != i), key=lambda j: (-round(like[i][j], 9), j))[:neighbours]
        rows[i] = x[i].double() + sum(a[n] * x[n].double() for n in near)
    left = [j for j in every if j not in rows]
    if left:
        rows[left[-1]] = sum(a[j] * x[j].double() for j in left)
    return rows, ranked(a, best) + sorted(others) + left[-1:]


def plain_budget(a: list[float], keep: int, share: float) -> tuple[list[int], list[int]]:
    """What attention chooses of keep - 1 tokens, and what is spread over the rest."""
    best = ranked(a, list(range(len(a))))[: math.floor(share * (keep - 1) + 0.5)]
    rest = [j for j in range(len(a)) if j not in best]
    count = keep - 1 - len(best)
    middles = [Fraction(2 * n + 1, 2 * count) * len(rest) for n in range(count)]
    return best, [rest[math.ceil(middle) - 1] for middle in middles]


def plain_outliers(a: list[float], plus: bool) -> tuple[list[int], list[int]]:
    low, high = np.quantile(np.array(a), [0.25, 0.75])
    best = [j for j, value in enumerate(a) if value > high + 1.5 * (high - low)] or ranked(a, list(range(len(a))))[:1]
    step = max(1, int(len(a) / len(best)) // 3)
    return best, [j for j in range(0, len(a) - 1, step) if plus and j not in best]


def seen(make_view: Any, shapes: Any = SHAPES, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    """A view with attention that has ties and outliers, and keys."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    attention = [torch.randn(n, generator=generator).mul(1.5).exp().mul(20).round().div(1000) for n in counts]
    keys = [torch.randn(n, 8, generator=generator) for n in counts]
    layer, reading = prumerge.PruMerge.reading(spec)
    return make_view(shapes, vision={(layer, reading): attention, (layer, Rows.KEYS): keys}, spec=spec, **budget)


def check(view: Any, selection: Any, item: int, crop: list[int], rows: dict[int, Tensor]) -> None:
    """The rows of a crop lie where they belong; crop: places of its tokens."""
    kept = [place for place in crop if selection.keep[item, place]]
    assert kept == sorted(crop[place] for place in rows)
    for place, row in rows.items():
        assert torch.allclose(selection.tokens[item, crop[place]].double(), row.double(), atol=1e-5)
    last = crop[list(rows)[-1]]  # what collects all that is not kept
    assert selection.merged_into[item, crop].tolist() == [place if place in kept else last for place in crop]


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("keep", [1, 2, 5, 17, 40, 62])
def test_the_plain_rows(make_view: Any, kept: Any, spec: ModelSpec, name: str, keep: int) -> None:
    view = seen(make_view, spec=spec, keep=keep)
    method = vtc.create(name)
    selection = method.select(view)
    kept(view, selection)
    layer, reading = method.reading(spec)
    for item, count in enumerate(view.items.counts):
        crop, x = list(range(count)), view.tokens[item, :count]
        if view.keep[item] == count:
            check(view, selection, item, crop, dict(enumerate(x)))
            continue
        a = view.vision_attention(layer, reading)[item, :count].tolist()
        chosen = plain_budget(a, view.keep[item], method.share)
        rows, _ = plain_rows(x, a, view.vision_attention(layer, Rows.KEYS)[item, :count], *chosen, 32)
        assert len(rows) == view.keep[item]
        check(view, selection, item, crop, rows)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_the_papers_own_count(make_view: Any, kept: Any, name: str) -> None:
    view = seen(make_view, [(7, 9), (8, 8), (12, 12), (2, 3)])
    method = vtc.create(name, count="outliers", neighbours=5)
    assert not method.needs_budget
    selection = method.select(view)
    assert selection.counts is None
    for item, count in enumerate(view.items.counts):
        a = view.vision_attention(23, ONE_HEAD)[item, :count].tolist()
        chosen = plain_outliers(a, name == "prumerge_plus")
        keys = view.vision_attention(23, Rows.KEYS)[item, :count]
        rows, _ = plain_rows(view.tokens[item, :count], a, keys, *chosen, 5)
        check(view, selection, item, list(range(count)), rows)


@pytest.mark.parametrize("layout", ["raster", "official"])
def test_crops_are_treated_one_by_one(make_view: Any, kept: Any, shares: Any, shape: Any, layout: Any) -> None:
    shapes = [shape(((1, 3, 3), (1, 6, 7)), newlines=True), (5, 5), shape(((3, 3, 3),))]
    view = seen(make_view, shapes, keep=13)
    selection = vtc.create("prumerge_plus", layout=layout).select(view)
    kept(view, selection)
    scores, keys = view.vision_attention(23, ONE_HEAD), view.vision_attention(23, Rows.KEYS)
    for item, count in enumerate(view.items.counts):
        crop = view.crop[item, :count].tolist()
        groups = [[p for p in range(count) if crop[p] == c] for c in range(max(crop) + 1)]
        listed: list[Tensor] = []
        for group, keep in zip(groups, shares(view.keep[item], [len(g) for g in groups]), strict=True):
            a = scores[item, group].tolist()
            rows, order = plain_rows(view.tokens[item, group], a, keys[item, group], *plain_budget(a, keep, 0.25), 32)
            listed += [rows[place] for place in order]
            if layout == "raster":
                check(view, selection, item, group, rows)
        if layout == "official":
            found = selection.tokens[item, :count][selection.keep[item, :count]]
            assert torch.allclose(found.double(), torch.stack(listed), atol=1e-5)


def test_outliers_of_rows_of_different_length() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 33, generator=generator).mul(1.3).exp()
    count = torch.randint(1, 34, (40,), generator=generator)
    mask = torch.arange(33) < count[:, None]
    found = outliers(values.masked_fill(~mask, 1e4), mask)
    for row in range(40):
        expected = plain_outliers(values[row, : count[row]].tolist(), False)[0]
        assert found[row].nonzero().flatten().tolist() == expected


def test_blocks_change_nothing(make_view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = seen(make_view, keep=20)
    whole = vtc.create("prumerge").select(view).tokens
    monkeypatch.setattr(prumerge, "BLOCK", 3 * 5 * 64)
    assert torch.allclose(vtc.create("prumerge").select(view).tokens, whole, atol=1e-6)


def test_plans_and_refusals() -> None:
    given = {"neighbours": 32, "count": "budget", "layout": "raster"}
    assert dataclasses.asdict(vtc.create("prumerge")) == {"share": 1.0, **given}
    assert dataclasses.asdict(vtc.create("prumerge_plus")) == {"share": 0.25, **given}
    for spec, layer, reading in ((CLIP_L, 23, ONE_HEAD), (QWEN, 31, Rows.RECEIVED)):
        plan = vtc.create("prumerge").plan(spec)
        assert plan.needs == Needs(vision={layer: (reading, Rows.KEYS)})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
    for options, message in (
        ({"share": 1.5}, r"share=1.5 is no part of the tokens; pass 1.0 for PruMerge, 0.25 for PruMerge\+"),
        ({"neighbours": -1}, "neighbours=-1 is no number of tokens; the paper uses 32"),
        ({"count": "outlier"}, "unknown count 'outlier'; did you mean 'outliers'"),
    ):
        with pytest.raises(VTCError, match=message):
            vtc.create("prumerge", **options)


@torch.no_grad()
def test_attention_and_keys_are_the_models_own() -> None:
    """One head as wide as all of them together, in the last layer, which the features do not come from."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], model=model)
    tower = adapters.of(model).vision_attention[-1]
    got: dict[str, Tensor] = {}
    hooks = [
        getattr(tower, f"{name}_proj").register_forward_hook(lambda m, a, output, name=name: got.update({name: output}))
        for name in "qk"
    ]
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    for hook in hooks:
        hook.remove()
    weights = (got["q"][:, :1] @ got["k"].transpose(1, 2) * got["q"].shape[2] ** -0.5).softmax(-1)[:, 0, 1:]
    with vtc.compress(model, "prumerge_plus", keep=6) as handle:
        model(**inputs)
    for item, x in enumerate(features):
        a = weights[item].tolist()
        rows, _ = plain_rows(x, a, got["k"][item, 1:], *plain_budget(a, 6, 0.25), 32)
        assert handle.trace[0].items[item].kept[0].tolist() == sorted(rows)


@pytest.mark.parametrize("model_name", TINY_MODELS)
@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_the_budget_is_met(model_name: str, name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(model_name, name, 0.5)
