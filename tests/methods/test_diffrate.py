"""DiffRate against its steps, one image and token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec, Rows
from vtc.methods.diffrate import PUBLISHED, DiffRate
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.encoders import build, encode, pixels

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
DEIT = ModelSpec("vit", 12, 11, True, tuple(range(12)), 0, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
LIMIT = 5e-5


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("diffrate")) == {
        "lists": None, "prune": None, "merge": None, "share": 0.5, "proportional": True,
    }  # fmt: skip
    plan = DiffRate().plan(CLIP_L)
    assert plan.stages == tuple(map(EncoderStage, range(1, 24)))
    assert plan.needs == vtc.Needs(dict.fromkeys(range(23), Rows.CLS))
    with pytest.raises(UnsupportedMethod, match="'diffrate' works on the patches inside the vision encoder"):
        DiffRate().plan(QWEN)
    with pytest.raises(UnsupportedMethod, match=r"lists of 12 blocks were given, this llava encoder has 23"):
        DiffRate(lists="deit_s_2.9g").plan(CLIP_L)
    for options, message in (
        ({"prune": (5, 4)}, "do not say once"),
        ({"lists": "deit_s_2.9g", "prune": (5,), "merge": (5,)}, "do not say once"),
        ({"prune": (9, 7), "merge": (8, 8)}, "are no numbers of tokens that fall"),
        ({"prune": (9, 7), "merge": (8,)}, "one of each per block"),
        ({"share": 1.5}, r"share=1.5 is outside \[0, 1\]"),
    ):
        with pytest.raises(VTCError, match=message):
            vtc.create("diffrate", **options)
    assert not DiffRate(prune=(9, 7), merge=(8, 5)).needs_budget


def test_published_lists_are_those_of_twelve_blocks_and_196_patches() -> None:
    method = DiffRate(lists="deit_s_2.9g")
    assert method.plan(DEIT).stages == tuple(map(EncoderStage, range(1, 13)))
    assert method.steps(12, 196, None, 1)[2:4] == [(189, 175), (167, 155)]
    assert all(len(numbers) == 12 for lists in PUBLISHED.values() for numbers in lists)
    model = build("CLIPModel")
    with vtc.compress(model, DiffRate(prune=(20, 9, 7), merge=(18, 8, 5))) as handle, torch.no_grad():
        with pytest.raises(UnsupportedMethod, match="begin with 19 patches and end with 4, this encoder has 16"):
            encode(model, pixels(1))
        assert not handle.stats.calls


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_budget_is_met_to_the_token(share: float) -> None:
    for tokens, keep in ((576, 64), (16, 1), (17, 16), (3, 3)):
        steps = DiffRate(share=share).steps(23, tokens, keep, 1)
        assert steps[-1][1] == keep
        flat = [n for pair in steps for n in pair]
        assert flat == sorted(flat, reverse=True) and flat[0] <= tokens


def test_gradients_pass_and_it_runs_in_front_of_an_llm() -> None:
    model, layout = tiny_model("llava-siglip"), [[4, "image", 3, "image", 5], [2, "image", 12]]
    with vtc.compress(model, "diffrate", retention=0.5) as handle:
        model(**tiny_inputs("llava-siglip", layout)).logits[:, -1].square().sum().backward()
    assert handle.stats.calls[0].visual_tokens_kept == (16.0, 8.0)
    embedding = next(model.model.vision_tower.parameters()).grad
    assert embedding is not None and float(embedding.abs().max()) > 0
