"""LOOK-M's choice and merge, one entry and one head at a time, and in the caches of a model."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.engine import eviction
from vtc.method.base import CacheStage, Selection, StageView
from vtc.method.llm_readings import PromptSum
from vtc.method.rows import Rows
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.between import Select, stand_between
from vtc.testing.contract import against_oracle, generate

SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


def plain_choice(received: list[float], keep: int) -> list[int]:
    """Of n entries the last tenth of the budget, and those that drew most; received: what each draws from all rows."""
    late = list(range(len(received)))[len(received) - int(0.1 * keep) :]
    others = sorted((n for n in range(len(received)) if n not in late), key=lambda n: (-round(received[n], 6), n))
    return sorted(late + others[: keep - len(late)])


def plain_merge(keys: Tensor, values: Tensor, kept: list[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """keys, values: [n, W] of one head. By kept entry the new key and value."""
    joined: dict[int, list[int]] = {k: [] for k in kept}
    length = [math.sqrt(float(key @ key)) for key in keys]
    for d in range(len(keys)):
        if d not in joined:
            cosine = [float(keys[d] @ keys[k]) / (length[d] * length[k]) for k in kept]
            joined[kept[cosine.index(max(cosine))]].append(d)

    def mean(x: Tensor, k: int) -> Tensor:
        parts = [x[k]] + [(x[d] + x[k]) / 2 for d in joined[k]]
        return torch.stack(parts).mean(0)

    return {k: mean(keys, k) for k in kept}, {k: mean(values, k) for k in kept}


@pytest.mark.parametrize("keep", [1, 3, 17, 63, 1000])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_plain_choice_and_merge(make_view: Any, keep: int, per_head: bool) -> None:
    view = make_view(SHAPES, stage=CacheStage(3), keep=keep)
    generator = torch.Generator().manual_seed(keep)
    sums = torch.rand(2, *view.visual.shape, generator=generator)
    sums = sums if per_head else sums[0]
    reading = PromptSum(per_head=True) if per_head else Rows.SUM
    shape = len(view.items), 2, view.items.mask.shape[1], 5
    keys, values = torch.randn(2, *shape, generator=generator)
    view = dataclasses.replace(view, llm_rows={(3, reading): sums}, cached=lambda: (keys, values))
    selection = vtc.create("lookm", per_head=per_head).select(view)
    for item, count in enumerate(view.items.counts):
        received = view.llm_attention(3, reading)[..., item, :count]
        for head in range(2):
            kept = plain_choice((received[head] if per_head else received).tolist(), view.keep[item])
            found = selection.keep[item, head] if per_head else selection.keep[item]
            assert found[:count].nonzero().flatten().tolist() == kept
            expected = plain_merge(keys[item, head, :count].double(), values[item, head, :count].double(), kept)
            for new, old, merged in zip(selection.entries, (keys, values), expected, strict=True):
                for k in kept:
                    assert float((new[item, head, k] - merged[k]).abs().max()) <= 1e-6
                    if bool((merged[k] == old[item, head, k].double()).all()):  # nothing joined it
                        assert torch.equal(new[item, head, k], old[item, head, k])


@torch.no_grad()
@pytest.mark.parametrize("layout", [["image", 9], [4, "image", 3, "image", 40]], ids=str)
def test_the_caches_hold_what_the_untouched_models_become(llm_weights: Any, layout: Any, limits: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [layout], seed=2, model=model)
    whole = model(**inputs, use_cache=True).past_key_values
    with vtc.compress(model, "lookm", retention=0.4) as handle:
        cache = model(**inputs, use_cache=True).past_key_values
    items = [item.positions.tolist() for item in handle.trace[0].items]
    for layer, weights in enumerate(llm_weights("llava-clip", inputs)):
        for head in range(2):
            received = weights[0, 2 * head : 2 * head + 2].mean(0).sum(0)
            old = [each[0, head].clone() for each in (whole.layers[layer].keys, whole.layers[layer].values)]
            gone = set()
            for places in items:
                kept = plain_choice(received[places].tolist(), 6)
                for x, merged in zip(old, plain_merge(old[0][places], old[1][places], kept), strict=True):
                    x[[places[k] for k in kept]] = torch.stack([merged[k] for k in kept])
                gone |= {places[n] for n in range(len(places)) if n not in kept}
            left = [place for place in range(len(received)) if place not in gone]
            for x, new in zip(old, (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
                assert float((new[0, head] - x[left]).abs().max()) <= limits.hidden


PARTS: list[tuple[Any, Any]] = [(["random", "lookm"], [0.5, 0.25]), ([FixedKeep(at=(0, 2)), "lookm"], [None, 0.5])]


@pytest.mark.parametrize(("methods", "retention"), PARTS, ids=["before", "inside"])
def test_behind_other_methods(methods: Any, retention: Any, limits: Any) -> None:
    """Layers hold other rows there, at other places than the prompt's; decoding is that of the masked model."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], extra=1, model=model)
    attach = lambda m: vtc.compress(m, methods, retention=retention)  # noqa: E731
    assert against_oracle(model, inputs, attach, 4) <= limits.logits


def test_the_oracle_notices_entries_that_are_not_replaced(monkeypatch: pytest.MonkeyPatch, limits: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], model=model)
    attach = lambda m: vtc.compress(m, "lookm", retention=0.5)  # noqa: E731
    assert against_oracle(model, inputs, attach, 3) <= limits.logits
    monkeypatch.setattr(eviction, "_write", lambda layer, kept: None)
    assert against_oracle(model, inputs, attach, 3) > limits.broken


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_budget_is_that_of_the_caches(name: str, keeps_entries: Any) -> None:
    keeps_entries(name, "lookm", 0.4)


def test_entries_that_leave_may_hold_anything(limits: Any) -> None:
    """Also where they lie in the padding of a row that keeps fewer."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], model=model)

    def spoilt(select: Select, view: StageView) -> Selection | None:
        selection = select(view)
        assert selection is not None and selection.entries is not None
        keys, values = (torch.where(selection.keep[..., None], each, torch.nan) for each in selection.entries)
        return dataclasses.replace(selection, entries=(keys, values))

    found = []
    for around in (None, spoilt):
        handle = vtc.compress(model, "lookm", retention=0.5)
        if around is not None:
            stand_between(handle, around)
        found.append(generate(model, inputs, handle, 3)[1])
    assert float((found[0] - found[1]).abs().max()) <= limits.logits
