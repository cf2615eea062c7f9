"""FrameFusion against its rules, one run and one token at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.errors import BudgetError, VTCError
from vtc.method.base import ModelSpec, Rows
from vtc.methods.framefusion import planned
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 8)
CLIPS = [(5, 3, 3), (1, 2, 3), (4, 4, 2), (3, 2, 2)]


def plain_runs(x: Tensor, size: int, similarity: float, most: int) -> list[int]:
    """The first token of every token's run; x: tokens of frames of `size` each. At most `most` tokens join one."""
    like = {j: float(torch.cosine_similarity(x[j].double(), x[j - size].double(), dim=0)) for j in range(size, len(x))}
    near = sorted((j for j in like if like[j] >= similarity), key=lambda j: (-round(like[j], 6), j))[:most]
    root = list(range(len(x)))
    for j in sorted(near):
        root[j] = root[j - size]
    return root


def scene(make_view: Any, shapes: Any, stage: int = 0, **budget: Any) -> Any:
    """A view of clips that move slowly."""
    generator = torch.Generator().manual_seed(2)
    view = make_view(shapes, spec=LLAMA, stage=stage, width=8, **budget)
    hidden = view.hidden.clone()
    for item, layout in enumerate(view.items.layouts):
        size = view.items.counts[item] // layout.n_crops
        for frame in range(1, layout.n_crops):
            place = view.items.index[item, (frame - 1) * size : (frame + 1) * size].view(2, size)
            noise = torch.randn(size, 8, generator=generator) * torch.rand(size, 1, generator=generator)
            hidden[view.items.row[item], place[1]] = hidden[view.items.row[item], place[0]] + 2 * noise
    rows = torch.rand(view.visual.shape, generator=generator)
    return dataclasses.replace(
        view, states=type(view.states)(hidden), llm_rows={(stage - 1, Rows.LAST): rows} if stage else {}
    )


@pytest.mark.parametrize("similarity", [0.6, 0.0, 0.9])
@pytest.mark.parametrize("budget", [{"retention": 0.5}, {"retention": 0.9}, {"keep": 30}], ids=str)
def test_runs_at_the_input(make_view: Any, video: Any, budget: Any, similarity: float) -> None:
    view = scene(make_view, [video(*each) for each in CLIPS] + [(5, 7)], **budget)
    selection = vtc.create("framefusion", similarity=similarity).select(view)
    assert selection.counts is None
    for item, size in enumerate([9, 6, 8, 4, 35]):
        count = view.items.counts[item]
        x = view.tokens[item, :count]
        root = plain_runs(x, size, similarity, count - view.budget.tokens(count))
        assert selection.keep[item, :count].nonzero().flatten().tolist() == sorted(set(root))
        assert selection.merged_into[item, :count].tolist() == root
        for first in set(root):
            mean = x[[j for j in range(count) if root[j] == first]].double().mean(0)
            assert torch.allclose(selection.tokens[item, first].double(), mean, atol=1e-5)
        assert not selection.keep[item, count:].any()


def test_it_prunes_once_where_little_merges(make_view: Any, video: Any) -> None:
    """Before layer 0 the first clip lost 5 of 50 tokens and goes on; the second 3 of 35, and is pruned; one is done."""
    method = vtc.create("framefusion", similarity=0.95)
    view = scene(make_view, [video(5, 3, 3), video(4, 4, 2), video(3, 2, 2)], stage=1, retention=0.5)
    seen = (((50, 35, 24), (22, 18, 12)),)
    view = dataclasses.replace(view, memory={(method, "seen"): seen})
    selection = method.select(view)
    total = 8 * vtc.tokens_to_keep(32, 0.5)
    left = int((total - 32) / 7 + 0.5)
    score = view.llm_attention(0, Rows.LAST)[1, :32].tolist()
    best = sorted(sorted(range(32), key=lambda j: (-score[j], j))[:left])
    assert selection.keep[1].nonzero().flatten().tolist() == best
    assert int(selection.keep[2].sum()) == 12
    root = plain_runs(view.tokens[0, :45], 9, 0.95, 45)
    assert selection.keep[0].nonzero().flatten().tolist() == sorted(set(root)) and len(set(root)) < 45
    assert method.reads(LLAMA, 1, view.memory)
    after = dataclasses.replace(view, memory={(method, "seen"): (((50, 35, 24), (45, 32, 12)),)})
    assert method.select(after) is None and not method.reads(LLAMA, 1, after.memory)


@given(st.integers(4, 40), st.integers(20, 3000), st.floats(0.03, 1.0), st.lists(st.floats(0, 1), min_size=40))
def test_the_mean_over_layers_is_met(layers: int, tokens: int, retention: float, merges: list[float]) -> None:
    """Whatever merges."""
    total = layers * vtc.tokens_to_keep(tokens, retention)
    if total - tokens < layers - 1:
        return
    before: list[int] = []
    entered: list[int] = []
    now, over = tokens, False
    for layer in range(layers):
        most, goes_on = (now, False) if over else planned(before, now, total, layers, 0.1)
        before.append(now)
        after = most if not goes_on else max(most, now - int(merges[layer] * now))
        over = over or after == most
        now = after
        entered.append(now)
    assert min(entered) >= 1 and over
    assert abs(sum(entered) - total) <= layers / 2 + 1


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("framefusion")) == {"similarity": 0.6, "ratio": 0.1}
    plan = vtc.create("framefusion").plan(LLAMA)
    assert (plan.stages, plan.positions) == (tuple(range(8)), "preserve")
    assert plan.needs == vtc.Needs(llm=dict.fromkeys(range(7), Rows.LAST))
    with pytest.raises(VTCError, match=r"similarity=1.5 is no cosine; pass a number in \[-1, 1\], the code has 0.6"):
        vtc.create("framefusion", similarity=1.5)
    with pytest.raises(VTCError, match=r"ratio=-0.1 is no share of the tokens; the code has 0.1"):
        vtc.create("framefusion", ratio=-0.1)
    model = tiny_model("llava-clip")
    with pytest.raises(BudgetError, match="cannot be met by 'framefusion'"):
        vtc.compress(model, "framefusion", retention=0.25)
    with torch.no_grad(), vtc.compress(model, "framefusion", keep=3), pytest.raises(BudgetError, match="cannot be met"):
        model(**tiny_inputs("llava-clip", [["image", 5]], model=model))


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("similarity", [0.6, -1.0])
def test_the_budget_is_met_on_every_model(name: str, similarity: float) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        method = vtc.create("framefusion", similarity=similarity)
        with torch.no_grad(), vtc.compress(model, method, retention=0.6) as handle:
            model(**inputs)
        items = handle.trace[0].items
        wanted = sum(vtc.tokens_to_keep(len(item.positions), 0.6) for item in items)
        assert abs(sum(handle.stats.calls[0].visual_tokens_kept) - wanted) <= 0.75 * len(items)
