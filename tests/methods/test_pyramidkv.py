"""PyramidKV's counts against the line they come from, and SnapKV's choice under them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import VTCError
from vtc.method.base import CacheStage, ModelSpec
from vtc.method.llm_readings import LastRows
from vtc.methods.pyramidkv import falling

SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


@pytest.mark.parametrize("layers", [1, 2, 3, 28, 32])
@pytest.mark.parametrize("beta", [1, 2, 20])
@pytest.mark.parametrize("have", [1, 2, 7, 64, 576])
def test_counts_lie_on_a_line_and_have_the_budget_as_mean(layers: int, beta: int, have: int) -> None:
    for keep in sorted({1, 2, have // 9, have // 2, have - 1, have} & {*range(1, have + 1)}):
        found = [falling(keep, have, layer, layers, beta) for layer in range(layers)]
        assert sum(found) == layers * keep
        assert all(0 < count <= have for count in found)
        assert found == sorted(found, reverse=True)
        last = max(1, keep // beta)
        most = 2 * keep - last
        if most > have:
            most, last = have, 2 * keep - have
        for layer, count in enumerate(found):
            line = keep if layers == 1 else most - layer * (most - last) / (layers - 1)
            assert abs(count - line) <= 0.5


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_entries_are_snapkvs_under_the_layers_counts(make_view: Any, kept_heads: Any, layer: int) -> None:
    spec = ModelSpec("llava", 24, 22, True, tuple(range(24)), 8)
    view = make_view(SHAPES, stage=CacheStage(layer), spec=spec, retention=0.3)
    rows = torch.rand(2, *view.visual.shape, generator=torch.Generator().manual_seed(layer))
    view = dataclasses.replace(view, llm_rows={(layer, LastRows(4, per_head=True)): rows})
    found = kept_heads(view, vtc.create("pyramidkv", window=4).select(view))
    for item, heads in enumerate(found):
        same = dataclasses.replace(view, budget=vtc.Budget(keep=max(1, len(heads[0]))))
        assert heads == kept_heads(same, vtc.create("snapkv", window=4).select(same))[item]
    counts = [len(heads[0]) for heads in found]
    assert counts == [falling(k, n, layer, 8, 20) for k, n in zip(view.keep, view.items.counts, strict=True)]


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_budget_is_that_of_the_caches(name: str, keeps_entries: Any) -> None:
    keeps_entries(name, "pyramidkv", 0.4)


def test_a_pyramid_upside_down_is_refused() -> None:
    with pytest.raises(VTCError, match=r"beta=0 would let the last layer keep more .* pass 1 or more"):
        vtc.create("pyramidkv", beta=0)
