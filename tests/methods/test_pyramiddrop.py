"""PyramidDrop: its schedule against the equations, its ranking against a plain one and the model's eager attention."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
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
PUBLISHED = {"ratios": (0.5, 0.25, 0.125)}


def deep(layers: int) -> ModelSpec:
    return dataclasses.replace(LLAMA, llm_layers=layers)


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


# --- the schedule
@pytest.mark.parametrize(
    ("layers", "late", "early"),
    [
        (32, (8, 16, 24), (2, 10, 18)),  # published, and ours for small budgets
        (28, (7, 14, 21), (2, 9, 16)),
        (36, (9, 18, 27), (2, 11, 20)),
        (40, (10, 20, 30), (2, 12, 22)),
        (4, (1, 2, 3), (1, 2)),
        (2, (1,), (1,)),
    ],
)
def test_layers_of_other_depths(layers: int, late: tuple[int, ...], early: tuple[int, ...]) -> None:
    method: Any = vtc.create("pyramiddrop")
    assert tuple(schedule.starts for schedule in method.schedules(deep(layers))) == (late, early)
    plan = method.plan(deep(layers))
    assert plan.stages == tuple(sorted({*late, *early}))
    assert plan.needs == vtc.Needs(llm={layer: Rows.LAST_AHEAD for layer in plan.stages})
    assert vtc.create("pyramiddrop", layers=[1]).plan(deep(layers)).stages == (1,)


def left(method: Any, view: Any) -> list[list[int]]:
    """Tokens of each item before and behind every stage of the plan."""
    counts = [view.items.counts]
    for layer in method.plan(view.model).stages:
        here = dataclasses.replace(view.items, counts=counts[-1])
        counts.append(method.left(dataclasses.replace(view, items=here), layer))
    return [list(column) for column in zip(*counts, strict=True)]


def mean_of(method: Any, model: ModelSpec, counts: list[int]) -> float:
    """Tokens that enter a layer, mean over the layers."""
    bounds = (0, *method.plan(model).stages, model.llm_layers)
    spans = [after - before for before, after in pairwise(bounds)]
    return sum(span * count for span, count in zip(spans, counts, strict=True)) / model.llm_layers


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # make_view holds no state
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=4),
    st.sampled_from([4, 28, 32, 36]),
    st.floats(0.07, 1.0),
)
def test_every_budget_is_met(make_view: Any, shapes: Any, layers: int, retention: float) -> None:
    model, method = deep(layers), vtc.create("pyramiddrop")
    view = make_view(shapes, spec=model, retention=retention)
    first = min(method.plan(model).stages)
    columns = zip(view.granted, view.items.counts, strict=True)
    low = any(layers * n < first * total + 0.5 * (layers - first) for n, total in columns)
    if low:
        with pytest.raises(BudgetError, match=rf"{first} of {layers} LLM layers see .* before any is dropped"):
            left(method, view)
        return
    for counts, granted in zip(left(method, view), view.granted, strict=True):
        assert abs(mean_of(method, model, counts) - granted) <= 0.5
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] >= 1


def test_the_published_setting(make_view: Any) -> None:
    method = vtc.create("pyramiddrop", **PUBLISHED)
    assert not method.needs_budget
    view = make_view([(24, 24), (3, 3), (3, 5), (1, 1)], spec=LLAMA)
    found = left(method, view)
    # What is no whole number is cut off; one token stays.
    assert found == [[576, 288, 144, 72], [9, 4, 2, 1], [15, 7, 3, 1], [1, 1, 1, 1]]
    assert mean_of(method, LLAMA, found[0]) / 576 == 15 / 32  # 46.9 %
    solved = make_view([(24, 24)], spec=LLAMA, retention=15 / 32)
    (counts,) = left(vtc.create("pyramiddrop"), solved)
    assert [counts[0], *(n for n, m in zip(counts[1:], counts, strict=False) if n != m)] == [576, 288, 144, 72]


@pytest.mark.parametrize(("retention", "stages"), [(0.3, (8, 16, 24)), (0.26, (8, 16, 24)), (0.24, (2, 10, 18))])
def test_small_budgets_drop_earlier(make_view: Any, retention: float, stages: tuple[int, ...]) -> None:
    method = vtc.create("pyramiddrop")
    view = make_view([(24, 24)], spec=LLAMA, retention=retention)
    (counts,) = left(method, view)
    changes = [
        layer
        for layer, before, after in zip(method.plan(LLAMA).stages, counts, counts[1:], strict=False)
        if after < before
    ]
    assert set(changes) <= set(stages)
    assert changes[0] == stages[0]


def test_items_of_a_batch_follow_their_own_list(make_view: Any) -> None:
    view = make_view([(24, 24), (8, 8)], spec=LLAMA, keep=60)
    large, small = left(vtc.create("pyramiddrop"), view)
    assert large[1] < 576  # before layer 2
    assert small[1] == 64 > small[2]  # not before layer 8, the second of the plan's stages


@pytest.mark.parametrize("stage", [2, 8, 18])
def test_the_plain_choice(make_view: Any, kept: Any, stage: int) -> None:
    view = make_view([(7, 9), (6, 6), (1, 1), (12, 12)], stage=stage, spec=LLAMA, keep=12)
    rows = torch.rand(view.visual.shape, generator=torch.Generator().manual_seed(3)).mul(40).round()
    view = dataclasses.replace(view, llm_rows={(stage, Rows.LAST_AHEAD): rows})
    method = vtc.create("pyramiddrop")
    selection = method.select(view)
    counts = method.left(view, stage)
    found = kept(view, selection) if selection is not None else None
    assert (selection is None) == (counts == view.items.counts)
    for item, count in enumerate(counts):
        mask = view.items.mask[item]
        scores = rows[view.items.row[item], view.items.index[item, mask]].tolist()
        if found is not None:
            assert found[item] == best(scores, count)


def test_defaults_and_refusals() -> None:
    method = vtc.create("pyramiddrop")
    assert dataclasses.asdict(method) == {"layers": None, "ratios": None, "schedule": None, "rank_by": "own"}
    assert vtc.create("pyramiddrop", layers=[1, 2], ratios=[0.5, 0.1]).layers == (1, 2)
    assert method.plan(LLAMA).positions == "compact"
    assert method.plan(dataclasses.replace(LLAMA, mrope=True)).positions == "preserve"
    for layers in ((), (0, 3), (3, 3), (4, 2)):
        with pytest.raises(VTCError, match="must rise, begin at 1 or later; the paper uses"):
            vtc.create("pyramiddrop", layers=layers)
    for ratios in ((), (0.2, 0.5, 0.1), (1.0, 0.5, 0.1), (0.5, 0.2, -0.1), (0.5, 0.2)):
        with pytest.raises(VTCError, match="must fall and lie between 0 and 1, one for each of 3 layers"):
            vtc.create("pyramiddrop", ratios=ratios)
    with pytest.raises(UnsupportedMethod, match=r"layers=\(8, 16, 24\) of 32 are 2 of this llava model's 3 LLM layers"):
        vtc.create("pyramiddrop", **PUBLISHED).plan(deep(3))
    with pytest.raises(UnsupportedMethod, match="has one layer; nothing can be dropped inside"):
        method.plan(deep(1))
    with pytest.raises(UnsupportedMethod, match="LLM layer 9; this llava model has layers 0 to 3"):
        vtc.compress(tiny_model("llava-clip"), "pyramiddrop", layers=(1, 9), retention=0.9)


# --- on models
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@pytest.mark.parametrize("name", ["llava-clip", "internvl"])
@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("rank_by", ["own", "before"])
def test_the_first_stage_is_that_of_eager_attention(name: str, layer: int, rank_by: str) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUT, seed=2, model=model)
    with torch.no_grad():
        with vtc.compress(model, "pyramiddrop", layers=(layer,), ratios=(0.4,), rank_by=rank_by) as handle:
            model(**inputs)
        model.set_attn_implementation("eager")
        weights = model(**inputs, output_attentions=True).attentions
    for record in handle.trace[0].items:
        row = weights[layer - (rank_by == "before")][record.row].mean(0)[-1]
        scores = [row[position].item() for position in record.positions]
        assert record.kept[layer].tolist() == best(scores, int(len(scores) * 0.4))


@pytest.mark.parametrize("rank_by", ["own", "before"])
@torch.no_grad()
def test_the_second_stage_reads_the_rows_that_are_left(rank_by: str) -> None:
    """The oracle: eager attention over the rows that the first stage left, numbered anew."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 5]], seed=2)
    # Dropped before layer 1: layer 1 sees the short prompt, and what leaves it arrives at the stage before layer 2.
    with vtc.compress(model, "pyramiddrop", layers=(1, 2), ratios=(0.5, 0.2), rank_by=rank_by) as handle:
        around: dict[str, torch.Tensor] = {}
        layer = model.model.language_model.layers[1]
        note = lambda module, args, kwargs, output: around.update(  # noqa: E731
            before=args[0] if args else kwargs["hidden_states"], own=output[0] if isinstance(output, tuple) else output
        )
        hook = layer.register_forward_hook(note, with_kwargs=True)
        model(**inputs)
        hook.remove()
    (item,) = handle.trace[0].items
    rows = around[rank_by]
    length = rows.shape[1]
    rotary = model.model.language_model.rotary_emb(rows, torch.arange(length)[None])
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    eager = tiny_model("llava-clip", attn_implementation="eager").model.language_model.layers[
        2 if rank_by == "own" else 1
    ]
    weights = eager.self_attn(eager.input_layernorm(rows), position_embeddings=rotary, attention_mask=mask)[1]
    first = item.kept[1].tolist()
    scores = weights[0].mean(0)[-1, 4 : 4 + len(first)].tolist()
    assert item.kept[2].tolist() == [first[j] for j in best(scores, 3)]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        for retention in (0.5, 0.7, 0.9):
            with torch.no_grad(), vtc.compress(model, "pyramiddrop", retention=retention) as handle:
                model(**inputs)
            (call,) = handle.stats.calls
            items = handle.trace[0].items
            wanted = sum(vtc.tokens_to_keep(len(item.positions), retention) for item in items)
            assert abs(sum(call.visual_tokens_kept) - wanted) <= 0.5 * len(items)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_an_earlier_turn_is_seen_by_the_stage_layer(padded: bool) -> None:
    """The softmax of the layer ahead runs over the cached rows too: as eager attention over the whole conversation."""
    model = tiny_model("llava-clip")
    first = tiny_inputs("llava-clip", [[40], [33 if padded else 40]], seed=1)
    second = tiny_inputs("llava-clip", [[3, "image", 5], [4, "image", 4]], seed=2)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    given = {"attention_mask": mask, "pixel_values": second["pixel_values"]}
    with vtc.compress(model, "pyramiddrop", layers=(2,), ratios=(0.4,)) as handle:
        cache = model(**first).past_key_values
        model(input_ids=second["input_ids"], past_key_values=cache, **given)
    model.set_attn_implementation("eager")
    weights = model(input_ids=ids, output_attentions=True, **given).attentions[2]
    for record in handle.trace[0].items:
        scores = weights[record.row].mean(0)[-1, first["input_ids"].shape[1] + record.positions].tolist()
        assert record.kept[2].tolist() == best(scores, int(len(scores) * 0.4))
