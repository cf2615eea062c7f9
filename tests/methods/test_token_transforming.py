"""Token Transforming against X' = W X, row by row, and pruning and merging as its limits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec, Rows
from vtc.methods.token_transforming import TokenTransforming
from vtc.testing import tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
LIMIT = 5e-5


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("token_transforming")) == {"mode": "m2m", "tau": 0.1, "layers": None}
    plan = TokenTransforming().plan(CLIP_L)
    assert plan.stages == tuple(map(EncoderStage, (5, 11, 17)))
    assert plan.needs == vtc.Needs(dict.fromkeys((4, 10, 16), Rows.CLS))
    with pytest.raises(UnsupportedMethod, match="'token_transforming' works on the patches inside the vision encoder"):
        TokenTransforming().plan(QWEN)
    with pytest.raises(UnsupportedMethod, match=r"layers=\(6, 30\): this llava encoder has 23 blocks"):
        TokenTransforming(layers=(6, 30)).plan(CLIP_L)
    for options in ({"tau": 0.0}, {"layers": (6, 6)}, {"mode": "many"}):
        with pytest.raises(VTCError, match=next(iter(options))):
            vtc.create("token_transforming", **options)


def test_a_small_temperature_is_pruning_and_rows_sum_to_one() -> None:
    tokens = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(2))
    anchors = torch.stack([torch.arange(0, 30, 3), torch.arange(1, 30, 3)])
    modes = {mode: TokenTransforming(mode=mode, tau=1e-3).matrix(tokens, anchors) for mode in ("m2m", "m2o", "o2o")}
    assert float((modes["m2m"] - modes["o2o"]).abs().max()) < 1e-4
    for matrix in modes.values():
        assert torch.allclose(matrix.sum(2), torch.ones(2, 10))
    assert ((modes["m2o"] > 0).sum(1) == 1).all()  # every token is in one row


def test_gradients_pass_and_it_runs_in_front_of_an_llm() -> None:
    model, layout = tiny_model("llava-clip"), [[4, "image", 3, "image", 5], [2, "image", 12]]
    with vtc.compress(model, "token_transforming", retention=0.5) as handle:
        model(**tiny_inputs("llava-clip", layout)).logits[:, -1].square().sum().backward()
    assert handle.stats.calls[0].visual_tokens_kept == (16.0, 8.0)
    embedding = next(model.model.vision_tower.parameters()).grad
    assert embedding is not None and float(embedding.abs().max()) > 0
