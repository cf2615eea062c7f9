"""FastV against a plain ranking of the last row, and against the model's own eager attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Rows
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2.5-vl", 32, 31, False, (7, 15, 23, 31), 28, mrope=True)
SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


def best(scores: list[float], keep: int) -> list[int]:
    """The highest scores, the lower index first among equals, in ascending order."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


def rows_for(view: Any, seed: int = 0) -> torch.Tensor:
    """[B, L] attention of each row's last token, with ties."""
    draw = torch.rand(view.visual.shape, generator=torch.Generator().manual_seed(seed))
    return draw.mul(40).round().div(1000)


def scores_of(view: Any, rows: torch.Tensor) -> list[list[float]]:
    """The items' scores, one list per item."""
    columns = zip(view.items.row, view.items.index, view.items.mask, strict=True)
    return [rows[row, index[mask]].tolist() for row, index, mask in columns]


# --- the rule
@pytest.mark.parametrize(
    "budget", [{"retention": 0.2}, {"retention": 1 / 3}, {"retention": 0.9}, {"keep": 100}], ids=str
)
def test_the_plain_choice(make_view: Any, kept: Any, budget: Any) -> None:
    view = make_view(SHAPES, stage=2, spec=LLAMA, **budget)
    rows = rows_for(view)
    view = dataclasses.replace(view, llm_rows={(1, Rows.LAST): rows})
    found = kept(view, vtc.create("fastv").select(view))
    for numbers, scores in zip(found, scores_of(view, rows), strict=True):
        mean = view.budget.tokens(len(scores))
        wanted = len(scores)
        if mean < len(scores):  # layers 0 and 1 of 32 see everything
            wanted = max(1, math.floor((32 * mean - 2 * len(scores)) / 30 + 0.5))
        assert numbers == best(scores, wanted)


@pytest.mark.parametrize(("ratio", "left"), [(0.5, [32, 18, 1, 3, 72]), (0.75, [16, 9, 1, 2, 36]), (0.99, [1] * 5)])
def test_the_published_fraction(make_view: Any, kept: Any, ratio: float, left: list[int]) -> None:
    """Python's rounding of N * (1 - R), half to even: 31.5 of 63 tokens are 32, 1.5 of 6 are 2."""
    method = vtc.create("fastv", ratio=ratio, layer=3)
    assert not method.needs_budget
    view = make_view(SHAPES, stage=3, spec=LLAMA)
    rows = rows_for(view, 1)
    view = dataclasses.replace(view, llm_rows={(2, Rows.LAST): rows})
    found = kept(view, method.select(view))
    assert [len(numbers) for numbers in found] == left
    for numbers, scores in zip(found, scores_of(view, rows), strict=True):
        assert numbers == best(scores, len(numbers))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # make_view holds no state
@given(st.data())
def test_images_of_a_prompt_ranked_together(make_view: Any, kept: Any, data: st.DataObject) -> None:
    sides = st.tuples(st.integers(1, 6), st.integers(1, 6))
    shapes = data.draw(st.lists(sides, min_size=1, max_size=5))
    ratio = data.draw(st.none() | st.floats(0.05, 0.95))
    budget = {"retention": data.draw(st.floats(0.3, 1.0))} if ratio is None else {}
    view = make_view(shapes, stage=1, spec=dataclasses.replace(LLAMA, llm_layers=64), **budget)
    rows = rows_for(view, data.draw(st.integers(0, 9)))
    view = dataclasses.replace(view, llm_rows={(0, Rows.LAST): rows})
    method = vtc.create("fastv", layer=1, ratio=ratio, scope="row")
    selection = method.select(view)
    assert selection.counts is None
    found = kept(view, selection)
    scores = scores_of(view, rows)
    for row in range(len(rows)):
        items = [item for item in range(len(view.items)) if view.items.rows[item] == row]
        joint = [(item, j) for item in items for j in range(len(scores[item]))]
        if ratio is None:
            wanted = sum(view.keep_from_layer(1)[item] for item in items)
        else:
            wanted = max(1, round(len(joint) * (1 - ratio)))
        chosen = best([scores[item][j] for item, j in joint], wanted)
        assert [(item, j) for item in items for j in found[item]] == [joint[place] for place in chosen]


def test_plan_defaults_and_refusals(make_view: Any) -> None:
    assert dataclasses.asdict(vtc.create("fastv")) == {
        "layer": 2, "ratio": None, "scope": "item", "schedule": None
    }  # fmt: skip
    for spec in (LLAMA, QWEN):
        plan = vtc.create("fastv", layer=3).plan(spec)
        assert (plan.stages, plan.positions) == ((3,), "preserve")
        assert plan.needs == vtc.Needs(llm={2: Rows.LAST})
    with pytest.raises(VTCError, match="layer=0 leaves no layer in front to rank by; pass at least 1"):
        vtc.create("fastv", layer=0)
    with pytest.raises(VTCError, match="ratio=nan of 'fastv' is not a finite number or None"):
        vtc.create("fastv", ratio=math.nan)
    for ratio in (0.0, 1.0, -1):
        with pytest.raises(VTCError, match="is no fraction to remove; pass a number between 0 and 1"):
            vtc.create("fastv", ratio=ratio)
    with pytest.raises(VTCError, match="unknown scope 'prompt'"):
        vtc.create("fastv", scope="prompt")
    with pytest.raises(BudgetError, match="'fastv' takes no retention or keep"):
        vtc.compress(tiny_model("llava-clip"), "fastv", ratio=0.5, retention=0.5)
    with pytest.raises(UnsupportedMethod, match="LLM layer 4; this llava model has layers 0 to 3"):
        vtc.compress(tiny_model("llava-clip"), "fastv", layer=4, retention=0.9)
    view = make_view([(24, 24)], stage=2, spec=LLAMA, retention=0.05)
    with pytest.raises(BudgetError, match=r"a mean of 29 of 576 .* 2 of 32 LLM layers .*retention 0.065"):
        vtc.create("fastv").select(view)


# --- on models
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@pytest.mark.parametrize("name", ["llava-clip", "llava-next"])
@pytest.mark.parametrize(("layer", "padding"), [(1, "left"), (2, "right"), (3, "left")])
def test_the_kept_set_is_that_of_eager_attention(name: str, layer: int, padding: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUT, seed=2, padding=padding, model=model)
    with torch.no_grad():
        with vtc.compress(model, vtc.testing.FixedKeep(rate=0.0)) as bare:
            model(**inputs)
        with vtc.compress(model, "fastv", layer=layer, ratio=0.6) as handle:
            model(**inputs)
        model.set_attn_implementation("eager")
        weights = model(**inputs, output_attentions=True).attentions[layer - 1].mean(1)
    last = (inputs["attention_mask"] * torch.arange(inputs["attention_mask"].shape[1])).amax(1)
    for record, empty in zip(handle.trace[0].items, bare.trace[0].items, strict=True):
        row = weights[record.row, last[record.row]]
        newlines = empty.kept[0].tolist()  # they stay whatever is dropped
        real = [j for j in range(len(record.positions)) if j not in newlines]
        chosen = best([row[record.positions[j]].item() for j in real], max(1, round(len(real) * 0.4)))
        assert record.kept[layer].tolist() == sorted([real[j] for j in chosen] + newlines)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("scope", ["item", "row"])
def test_the_budget_is_met_on_every_model(name: str, scope: Any) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        for retention in (0.5, 0.8):
            with torch.no_grad(), vtc.compress(model, "fastv", layer=1, retention=retention, scope=scope) as handle:
                model(**inputs)
            (call,) = handle.stats.calls
            items = handle.trace[0].items
            wanted = sum(vtc.tokens_to_keep(len(item.positions), retention) for item in items)
            assert abs(sum(call.visual_tokens_kept) - wanted) <= 0.5 * len(items)


def test_an_image_may_lose_everything_to_another() -> None:
    """The question's attention is far from even, so a budget of few tokens leaves nothing of one of the images."""
    model = tiny_model("llava-clip")
    emptied = 0
    for seed in range(4):
        inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5]], seed=seed)
        with vtc.compress(model, "fastv", ratio=0.9, scope="row") as handle:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        counts = [len(item.kept[2]) for item in handle.trace[0].items]
        assert sum(counts) == 3
        emptied += 0 in counts
    assert emptied
