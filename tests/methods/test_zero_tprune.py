"""Zero-TPrune against its steps, one image, head and token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec
from vtc.methods.zero_tprune import GRAPH, ZeroTPrune, importance
from vtc.testing import tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
LIMIT = 5e-5


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("zero_tprune")) == {
        "layers": None, "similar": 10, "iterations": (50, 10, 1), "variance": (0.01, 0.7),
    }  # fmt: skip
    plan = ZeroTPrune().plan(CLIP_L)
    assert plan.stages == tuple(map(EncoderStage, (2, 6, 12, 17, 21)))
    assert plan.needs == vtc.Needs(dict.fromkeys((1, 5, 11, 16, 20), GRAPH))
    assert ZeroTPrune().stages_of(dataclasses.replace(CLIP_L, feature_layer=11)) == (1, 3, 6, 9, 11)
    with pytest.raises(UnsupportedMethod, match="'zero_tprune' works on the patches inside the vision encoder"):
        ZeroTPrune().plan(QWEN)
    with pytest.raises(UnsupportedMethod, match=r"layers=\(3, 24\): pruning layers .* choose among 1 to 23"):
        ZeroTPrune(layers=(3, 24)).plan(CLIP_L)
    for options in ({"layers": (3, 1)}, {"similar": -1}, {"iterations": (5, 0, 1)}, {"variance": (0.7, 0.01)}):
        with pytest.raises(VTCError, match=next(iter(options))):
            vtc.create("zero_tprune", **options)


def test_heads_are_joined_by_their_root_mean_square() -> None:
    mass = torch.tensor([[[0.25, 0.25], [0.1, 0.4], [0.5, 0.0]]])
    found = importance(mass, torch.ones(1, 2, dtype=torch.bool), torch.tensor([4]), (0.01, 0.7))
    assert torch.allclose(found, torch.tensor([[0.1, 0.4]]))  # one head is even, one too uneven


def test_it_runs_in_front_of_an_llm() -> None:
    model, layout = tiny_model("llava-clip"), [[4, "image", 3, "image", 5], [2, "image", 12]]
    with torch.no_grad(), vtc.compress(model, "zero_tprune", retention=0.5) as handle:
        model(**tiny_inputs("llava-clip", layout))
    assert handle.stats.calls[0].visual_tokens_kept == (16.0, 8.0)
