"""TRIM against a loop over tokens: products with the question, the mean of the rest, and the paper's own count."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnknownName, UnsupportedMethod
from vtc.method.base import ModelSpec, Rows
from vtc.method.pairs import PairFeatures
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.pairs import tiny_pair
from vtc.testing.processors import tiny_processor

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, clip=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
PAIR = "somewhere"
KEY = 22, Rows.HIDDEN


def seen(make_view: Any, shapes: Any, ties: bool = False, **budget: Any) -> Any:
    """A view with rows of a tower that a matrix projects to where the questions are."""
    generator = torch.Generator().manual_seed(3)
    bare = make_view(shapes, spec=CLIP_L, **budget)
    sizes = [layout.n_tokens for layout in bare.items.layouts]
    rows = [torch.randn(n, 5, generator=generator) for n in sizes]
    rows = [each.round() for each in rows] if ties else rows
    matrix, texts = torch.randn(5, 4, generator=generator), torch.randn(len(bare.valid), 4, generator=generator)
    matrix, texts = (each.round() if ties else each for each in (matrix, texts))
    view = make_view(shapes, vision={KEY: rows}, spec=CLIP_L, **budget)
    return dataclasses.replace(view, pairs={PAIR: PairFeatures(texts, lambda rows: rows @ matrix)})


def plain_scores(view: Any, item: int) -> list[float]:
    """-p_j . t of every token, in double precision."""
    pair, rows = view.pair(PAIR), view.vision_attention(*KEY)[item].double()
    text = pair.texts[view.items.rows[item]].double()
    projected = torch.stack([pair.project(row[None].float())[0].double() for row in rows])
    return [-float(sum(a * b for a, b in zip(row.tolist(), text.tolist(), strict=True))) for row in projected]


def plain_part(scores: list[float], keep: int | None) -> tuple[list[int], list[int]]:
    """Places kept and places merged of one crop; keep: with the mean, None for the paper's count."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    if keep is None:
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        low, high = np.quantile(weights, [0.25, 0.75])
        count = max(1, int((weights > high + 1.5 * (high - low)).sum()))
    elif keep == 0:
        return [], []
    else:
        count = keep - 1 if keep < len(scores) else keep
    return sorted(order[:count]), sorted(order[count:])


def laid_out(view: Any, selection: Any, item: int) -> Tensor:
    """The rows that stand for an item, in their order."""
    return selection.tokens[item, selection.keep[item] & view.items.mask[item]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "budget", [{"keep": 1}, {"keep": 2}, {"keep": 7}, {"retention": 0.4}, {"retention": 0.9}, {}], ids=str
)
def test_the_plain_choice(make_view: Any, shares: Any, shape: Any, budget: Any, ties: bool) -> None:
    shapes = [(5, 5), shape(((1, 3, 3), (2, 2, 3)), newlines=True), (1, 1), shape(((2, 4, 3),)), (2, 2)]
    view = seen(make_view, shapes, ties, **budget)
    method = vtc.create("trim", pair=PAIR, count="budget" if budget else "outliers")
    selection = method.select(view)
    for item in range(len(shapes)):
        count, scores, crop = view.items.counts[item], plain_scores(view, item), view.crop[item].tolist()
        groups = [[p for p in range(count) if crop[p] == c] for c in range(max(crop[:count]) + 1)]
        keep = shares(view.keep[item], [len(g) for g in groups]) if budget else [None] * len(groups)
        rows, stands = list[Tensor](), dict[int, int]()
        for group, k in zip(groups, keep, strict=True):
            best, rest = plain_part([scores[p] for p in group], k)
            for place in best:
                stands[group[place]] = len(rows)
                rows.append(view.tokens[item, group[place]])
            if rest:
                stands |= dict.fromkeys([group[place] for place in rest], len(rows))
                rows.append(view.tokens[item, [group[place] for place in rest]].double().mean(0).float())
        assert torch.allclose(laid_out(view, selection, item), torch.stack(rows), atol=1e-6)
        seats = selection.keep[item].nonzero().flatten().tolist()
        found = {
            p: seats.index(into) for p, into in enumerate(selection.merged_into[item, :count].tolist()) if into >= 0
        }
        assert found == stands
        if budget:
            assert len(rows) == view.keep[item] == selection.counts[item]


def test_what_resembles_the_question_goes_first(make_view: Any) -> None:
    view = seen(make_view, [(2, 3)], keep=3)
    scores = plain_scores(view, 0)
    left = vtc.create("trim", pair=PAIR).select(view).merged_into[0].tolist()
    merged = [p for p in range(6) if left.count(left[p]) > 1]
    assert sorted(merged) == sorted(sorted(range(6), key=lambda p: scores[p])[:4])


def test_plans_and_refusals() -> None:
    method = vtc.create("trim", pair=PAIR)
    plan = method.plan(CLIP_L)
    assert (plan.stages, plan.needs.vision, plan.needs.pairs) == ((0,), {22: (Rows.HIDDEN,)}, (PAIR,))
    assert plan.positions == "compact"
    assert vtc.create("trim", count="outliers").needs_budget is False
    with pytest.raises(UnsupportedMethod, match=r"'trim' compares patches .* this qwen2_5_vl model is no half; choose"):
        method.plan(QWEN)
    with pytest.raises(UnknownName, match="unknown count 'outlier'; did you mean 'outliers'"):
        vtc.create("trim", count="outlier")


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "llava-next-video"])
@pytest.mark.parametrize("retention", [0.3, 0.75])
def test_the_budget_is_met(name: str, retention: float) -> None:
    model, kind = tiny_model(name), "image"
    inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12], [9]], seed=3, model=model)
    attach = {"pair": tiny_pair(name), "processor": tiny_processor(name)}
    with vtc.compress(model, "trim", retention=retention, **attach) as handle, torch.no_grad():
        model(**inputs)
    granted = [0] * 3
    for item in handle.trace[0].items:
        granted[item.row] += vtc.tokens_to_keep(len(item.positions), retention)
    assert handle.stats.calls[0].visual_tokens_kept == pytest.approx(granted)
