"""SnapKV's rule on visual entries, one entry at a time, and against the model's own attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import VTCError
from vtc.method.base import CacheStage
from vtc.method.llm_readings import LastRows
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.contract import against_oracle

SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


def plain_choice(
    attention: list[float], prompt: list[int], visual: list[int], keep: int, window: int, kernel: int
) -> list[int]:
    """attention: what each place of the sequence draws from the window. Numbers, inside `visual`, of what stays."""
    inside = set(prompt[-window:])
    seen = [0.0 if place in inside else value for place, value in enumerate(attention)]
    half = kernel // 2
    score = {}
    for number, place in enumerate(visual):
        around = [seen[p] for p in range(place - half, place + half + 1) if 0 <= p < len(seen)]
        score[number] = round(sum(around) / kernel, 6)
    recent = [number for number, place in enumerate(visual) if place in inside][::-1][:keep]
    others = sorted((n for n in score if visual[n] not in inside), key=lambda n: (-score[n], n))
    return sorted(recent + others[: keep - len(recent)])


@pytest.mark.parametrize("keep", [1, 3, 17, 63, 1000])
@pytest.mark.parametrize(("window", "kernel"), [(32, 5), (2, 1), (1, 7), (200, 3)])
def test_the_plain_choice(make_view: Any, kept: Any, kept_heads: Any, keep: int, window: int, kernel: int) -> None:
    options = {"window": window, "kernel": kernel}
    view = make_view(SHAPES, stage=CacheStage(3), keep=keep)
    rows = torch.rand(2, *view.visual.shape, generator=torch.Generator().manual_seed(1)).mul(30).round()  # with ties
    rows = rows.masked_fill(~view.valid, 0)
    read = {(3, LastRows(window, per_head=True)): rows, (3, LastRows(window)): rows[1]}
    view = dataclasses.replace(view, llm_rows=read)
    shared = kept(view, vtc.create("snapkv", **options, per_head=False).select(view))
    for item, heads in enumerate(kept_heads(view, vtc.create("snapkv", **options).select(view))):
        row, count = view.items.rows[item], view.items.counts[item]
        prompt = view.prompt[row].nonzero().flatten().tolist()
        visual = view.items.index[item, :count].tolist()
        for head, numbers in enumerate(heads):
            values = rows[head, row].tolist()
            assert numbers == plain_choice(values, prompt, visual, view.keep[item], window, kernel)
        assert shared[item] == heads[1]


@torch.no_grad()
@pytest.mark.parametrize("layout", [["image", 9], [4, "image", 3, "image", 40], [2, "image"]], ids=str)
def test_the_kept_sets_are_those_of_the_models_own_attention(llm_weights: Any, layout: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [layout], seed=2, model=model)
    length = inputs["input_ids"].shape[1]
    with vtc.compress(model, "snapkv", window=8, retention=0.4) as handle:
        model(**inputs)
    with vtc.compress(model, "snapkv", window=8, per_head=False, retention=0.4) as shared:
        model(**inputs)
    prompt, differ = list(range(length)), 0
    for layer, weights in enumerate(llm_weights("llava-clip", inputs)):
        rows = weights[0, :, -8:].mean(1)
        of_heads = [rows[:2].mean(0), rows[2:].mean(0)]  # two query heads share a KV head
        for item, other in zip(handle.trace[0].items, shared.trace[0].items, strict=True):
            visual = item.positions.tolist()
            chosen = [plain_choice(each.tolist(), prompt, visual, 6, 8, 5) for each in of_heads]
            assert [sets.nonzero().flatten().tolist() for sets in item.heads[CacheStage(layer)]] == chosen
            differ += chosen[0] != chosen[1]
            kept = other.kept[CacheStage(layer)].tolist()
            assert kept == plain_choice(rows.mean(0).tolist(), prompt, visual, 6, 8, 5)
    assert differ or layout[-1] == "image"  # the window alone fills the budget there


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_budget_is_that_of_the_caches(name: str, keeps_entries: Any) -> None:
    keeps_entries(name, "snapkv", 0.4)


def test_plans_and_refusals() -> None:
    spec = vtc.adapters.families()["llava"].references[0]
    assert vtc.create("snapkv").plan(spec).stages == tuple(map(CacheStage, range(32)))
    with pytest.raises(VTCError, match=r"window=0 holds no row to rank by; pass 1 or more"):
        vtc.create("snapkv", window=0)
    for kernel in (0, 4):
        with pytest.raises(VTCError, match="has no middle; pass an odd width"):
            vtc.create("snapkv", kernel=kernel)


def test_behind_a_method_before_the_llm(limits: Any) -> None:
    """Each part has its share of what reaches it; decoding is that of the masked model."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], extra=1, model=model)
    attach = lambda m: vtc.compress(m, ["random", "snapkv"], retention=[0.5, 0.25])  # noqa: E731
    assert against_oracle(model, inputs, attach, 4) <= limits.logits
    with attach(model) as handle, torch.no_grad():
        model(**inputs)
    assert (handle.stats.retention, handle.stats.cache_retention) == (0.5, 0.125)
