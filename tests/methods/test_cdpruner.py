"""CDPruner against determinants computed one by one, its relevance, and the numerical rank."""

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
from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs
from vtc.method.states import States
from vtc.methods.cdpruner import relevance
from vtc.ops.greedy import greedy_map
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def plain_relevance(tokens: Tensor, texts: Tensor, *, inverse: bool = True, theta: float | None = None) -> list[float]:
    """tokens [n, D], texts [M, D], one token at a time."""
    cos = lambda a, b: float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))  # noqa: E731
    sign = -1 if inverse else 1
    values = [sign * sum(cos(token, text) for text in texts) / len(texts) for token in tokens]
    low, high = min(values), max(values)
    scaled = [(value - low + 1e-6) / (high - low) if high > low else 1.0 for value in values]
    return scaled if theta is None else [math.exp(theta / (2 * (1 - theta)) * value) for value in scaled]


def plain_choice(x: Tensor, quality: list[float], keep: int) -> list[int]:
    """The largest log det of the kernel after every step, then by quality once every determinant is zero."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    q = torch.tensor(quality).double()
    kernel = q[:, None] * (unit @ unit.T) * q
    taken: list[int] = []
    while len(taken) < keep:
        free = [v for v in range(len(x)) if v not in taken]
        if len(taken) < int(torch.linalg.matrix_rank(unit, rtol=1e-6)):
            taken.append(max(free, key=lambda v: (float(kernel[[*taken, v]][:, [*taken, v]].logdet()), -v)))
        else:
            taken.append(max(free, key=lambda v: (quality[v], -v)))
    return sorted(taken)


# --- relevance
@pytest.mark.parametrize("options", [{}, {"inverse": False}, {"theta": 0.5}, {"theta": 0.0}], ids=str)
def test_relevance(options: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, texts = torch.randn(2, 63, 17, generator=generator), torch.randn(2, 3, 17, generator=generator)
    mask = torch.ones(2, 63, dtype=torch.bool)
    mask[1, 40:] = False
    found = relevance(tokens, texts, mask, **options)
    for item, count in enumerate((63, 40)):
        expected = torch.tensor(plain_relevance(tokens[item, :count], texts[item], **options))
        assert torch.allclose(found[item, :count], expected, atol=1e-6)
    assert torch.equal(relevance(tokens * 7, texts * 0.1, mask, **options) > 0.5, found > 0.5)


def test_equal_tokens_are_equally_relevant() -> None:
    mask = torch.ones(1, 5, dtype=torch.bool)
    for texts in (torch.randn(1, 1, 4), torch.zeros(1, 1, 4)):
        assert relevance(torch.ones(1, 5, 4), texts, mask).tolist() == [[1.0] * 5]


# --- the choice
@pytest.mark.parametrize("options", [{}, {"inverse": False}, {"theta": 0.5}], ids=str)
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 4}, {"keep": 9}], ids=str)
@pytest.mark.parametrize("scope", ["item", "crop"])
def test_the_plain_choice(
    make_view: Any, kept: Any, shares: Any, shape: Any, scope: Any, options: Any, budget: Any
) -> None:
    """The views' rows are 6 wide, so that nine tokens exceed the rank."""
    shapes = [(5, 5), shape(((1, 3, 3), (2, 2, 3)), newlines=True), (1, 1), shape(((2, 4, 3),)), (2, 2)]
    view = make_view(shapes, **budget)
    found = kept(view, vtc.create("cdpruner", scope=scope, **options).select(view))
    for item, numbers in enumerate(found):
        count, row = view.items.counts[item], view.items.rows[item]
        x = view.tokens[item, :count]
        text = view.hidden[row, view.text[row]].mean(0, keepdim=True)
        quality = plain_relevance(x, text, **options)
        crop = view.crop[item, :count].tolist()
        groups = [[p for p in range(count) if crop[p] == c] for c in range(max(crop) + 1)]
        groups = [list(range(count))] if scope == "item" else groups
        expected: list[int] = []
        for group, keep in zip(groups, shares(view.keep[item], [len(g) for g in groups]), strict=True):
            places = plain_choice(x[group], [quality[p] for p in group], keep)
            expected += [int(view.items.token[item, group[place]]) for place in places]
        assert numbers == sorted(expected)


def test_the_question_decides(make_view: Any, kept: Any) -> None:
    """Of tokens at right angles the relevant ones stay; without a question the first ones do."""
    view = make_view([(2, 3)], keep=2)
    hidden = view.hidden.clone()
    hidden[0, view.visual[0]] = torch.eye(6)
    hidden[0, view.text[0]] = torch.tensor([0.0, 1.0, 2.0, 3.0, 5.0, 4.0])  # in front of the image and behind it
    asked = dataclasses.replace(view, states=States(hidden))
    choose = lambda view, **options: kept(view, vtc.create("cdpruner", **options).select(view))  # noqa: E731
    assert choose(asked, inverse=False) == [[4, 5]]
    assert choose(asked) == [[0, 1]]
    assert choose(dataclasses.replace(asked, text=torch.zeros_like(view.text)), inverse=False) == [[0, 1]]
    assert choose(asked, inverse=False, theta=0.0) == [[0, 1]]


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.integers(1, 40))
def test_every_step_chooses_another_token(seed: int, length: int, rank: int, steps: int) -> None:
    """Also far beyond the rank, with zero tokens, zero relevance and repeated tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, rank, generator=generator) @ torch.randn(rank, 7, generator=generator)
    x = x[torch.randint(length, (2, length), generator=generator)]
    x[0, ::5] = 0
    quality = torch.rand(2, length, generator=generator).mul(3).floor()
    mask = torch.ones(2, length, dtype=torch.bool)
    order = greedy_map(x, quality, steps, mask)
    for row in order.tolist():
        assert len(set(row[:length])) == min(steps, length)


def test_rounding_does_not_pass_for_rank() -> None:
    """Tokens in a space of 12 dimensions, up to 1e-7: the first 12 span it, the others follow by relevance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 12, generator=generator) @ torch.randn(1, 12, 64, generator=generator)
    x = x * (1 + 1e-7 * torch.randn(x.shape, generator=generator))
    quality = torch.rand(1, 200, generator=generator)
    order = greedy_map(x, quality, 60, torch.ones(1, 200, dtype=torch.bool))[0].tolist()
    assert torch.linalg.matrix_rank(x[0, order[:12]].double(), rtol=1e-4) == 12
    rest = [v for v in range(200) if v not in order[:12]]
    assert order[12:] == sorted(rest, key=lambda v: -float(quality[0, v]))[:48]


def test_a_long_video_fits_into_memory(peak_memory: Any) -> None:
    """The basis is as wide as the tokens, whatever their number."""
    setup = (
        "from vtc.ops.greedy import greedy_map\n"
        "x, q, mask = torch.randn(1, 100000, 64), torch.rand(1, 100000), torch.ones(1, 100000).bool()"
    )
    assert peak_memory(setup, "greedy_map(x, q, 400, mask)") < 140 * 2**20  # 400 Cholesky rows alone are 150 MiB


# --- plans and models
def test_plans_and_refusals() -> None:
    method = vtc.create("cdpruner")
    assert (method.scope, method.inverse, method.theta) == ("crop", True, None)
    for spec, positions in ((CLIP, "compact"), (QWEN, "preserve")):
        plan = method.plan(spec)
        assert (plan.stages, plan.needs, plan.positions) == ((0,), Needs(), positions)
    with pytest.raises(VTCError, match=r"unknown scope 'frame'.*crop"):
        vtc.create("cdpruner", scope="frame")
    for theta in (1.0, -0.1):
        with pytest.raises(VTCError, match=rf"theta={theta} is outside \[0, 1\); write for example 0.5"):
            vtc.create("cdpruner", theta=theta)


def test_the_kept_set_is_the_one_computed_by_hand() -> None:
    inputs = tiny_inputs("llava-siglip", [[3, "image", 5, "image", 2], [2, "image", 9]], seed=4)
    model = tiny_model("llava-siglip")
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        words = model.get_input_embeddings()(inputs["input_ids"])
        with vtc.compress(model, "cdpruner", keep=6) as handle:
            model(**inputs)
    for x, item in zip(features, handle.trace[0].items, strict=True):
        ids, there = inputs["input_ids"][item.row], inputs["attention_mask"][item.row].bool()
        image = ids == model.config.image_token_id
        question = there & ~image
        quality = plain_relevance(x, words[item.row, question].mean(0, keepdim=True))
        assert item.kept[0].tolist() == plain_choice(x, quality, 6)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("retention", [0.3, 0.75])
def test_the_budget_is_met(name: str, retention: float) -> None:
    model = tiny_model(name)
    kind = TINY_MODELS[name].kinds[-1]
    inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12], [9]], seed=3, model=model)
    with vtc.compress(model, "cdpruner", retention=retention) as handle, torch.no_grad():
        model(**inputs)
    granted = [0] * 3
    for item in handle.trace[0].items:
        granted[item.row] += vtc.tokens_to_keep(len(item.positions), retention)
    assert handle.stats.calls[0].visual_tokens_kept == pytest.approx(granted)
