"""FasterVLM against a plain ranking, and as what it is said to equal."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
SHAPES = [(7, 9), (8, 8), (1, 1), (2, 3)]


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("scope", ["crop", "item"])
@pytest.mark.parametrize("keep", [1, 13, 60])
def test_the_plain_choice(
    make_view: Any, kept: Any, shares: Any, shape: Any, spec: ModelSpec, scope: Any, keep: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [*SHAPES, shape(((3, 4, 4),))]
    counts = [63, 64, 1, 6, 48]
    scores = [torch.rand(n, generator=generator).mul(40).round().div(1000) for n in counts]  # with ties
    decoys = [torch.rand(n, generator=generator) for n in counts]
    view = make_view(shapes, vision={spec.key_layer: scores, spec.key_layer - 1: decoys}, spec=spec, keep=keep)
    found = kept(view, vtc.create("fastervlm", scope=scope).select(view))
    for item, count in enumerate(counts):
        size = 16 if item == 4 and scope == "crop" else count
        parts = [list(range(first, first + size)) for first in range(0, count, size)]
        expected: list[int] = []
        for part, few in zip(parts, shares(view.keep[item], [size] * len(parts)), strict=True):
            expected += sorted(part, key=lambda j: (-float(scores[item][j]), j))[:few]
        assert found[item] == sorted(expected)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
def test_it_is_vispruner_without_diversity_and_vtc_cls_of_one_layer(name: str) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 6], [2, kind, 9, kind, 3]], model=model)
        kept = []
        for method in ("fastervlm", vtc.create("vispruner", share=1.0), vtc.create("vtc_cls", layers=1)):
            with vtc.compress(model, method, retention=0.4) as handle:
                model(**inputs)
            kept.append([item.kept[0].tolist() for item in handle.trace[0].items])
        assert kept[0] == kept[1] == kept[2]
        wanted = sum(vtc.tokens_to_keep(len(item.positions), 0.4) for item in handle.trace[0].items)
        assert sum(map(len, kept[0])) == wanted


def test_plans() -> None:
    assert dataclasses.asdict(vtc.create("fastervlm")) == {"scope": "crop"}
    for spec, layer, reading in ((CLIP_L, 22, Rows.CLS), (SIGLIP, 26, Rows.RECEIVED), (QWEN, 31, Rows.RECEIVED)):
        plan = vtc.create("fastervlm").plan(spec)
        assert plan.needs == Needs(vision={layer: reading})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
