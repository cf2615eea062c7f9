"""Expediting ViT against its formulas, one patch and cluster at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import PRE_LLM, EncoderStage, ModelSpec, Needs, Plan, Selection
from vtc.methods.expediting_vit import ExpeditingViT
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.inside.expediting_vit import cluster, rebuild

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
LIMIT = 5e-5


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("expediting_vit")) == {
        "clusters": None, "layer": None, "reconstruct": True, "temperature": 0.01, "iterations": 5, "window": 5,
        "neighbours": 20, "norm": "sum",
    }  # fmt: skip
    assert ExpeditingViT().plan(CLIP_L) == Plan((EncoderStage(5), EncoderStage(23)), Needs(), "compact", restores=True)
    assert ExpeditingViT(layer=9, reconstruct=False).plan(CLIP_L).stages == (EncoderStage(9),)
    with pytest.raises(UnsupportedMethod, match="'expediting_vit' works on the patches inside the vision encoder"):
        ExpeditingViT().plan(QWEN)
    with pytest.raises(UnsupportedMethod, match="layer=23: this llava encoder has blocks 0 to 22"):
        ExpeditingViT(layer=23).plan(CLIP_L)
    for options in ({"clusters": (0, 3)}, {"window": 4}, {"neighbours": 0}, {"iterations": 0}, {"norm": "l3"}):
        with pytest.raises(VTCError, match=next(iter(options))):
            vtc.create("expediting_vit", **options)


@pytest.mark.parametrize("offset", [0.0, 8.0])
@pytest.mark.parametrize(("grid", "small"), [((4, 6), (2, 3)), ((5, 7), (4, 2))])
def test_clusters_and_rebuilt_rows_are_those_of_the_loop(
    grid: tuple[int, int], small: tuple[int, int], offset: float
) -> None:
    """At a temperature that shares patches unevenly, and far from the origin, where squares cancel."""
    method = ExpeditingViT(temperature=1.0, window=3, neighbours=3)
    tokens = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(1)) + offset
    centres = method.clustered(tokens, grid, small)
    rows = method.rebuilt(centres.sin(), tokens, centres)
    for one, centre, row in zip(tokens, centres, rows, strict=True):
        expected = cluster(one, grid, small, method)
        assert float((centre - torch.stack(expected)).abs().max()) <= LIMIT
        assert float((row - rebuild(centre.sin(), one, expected, method)).abs().max()) <= LIMIT


@pytest.mark.parametrize("name", ["llava-clip", "llava-next"])
@torch.no_grad()
def test_in_front_of_an_llm_every_patch_is_a_token_again(name: str) -> None:
    model, layout = tiny_model(name), [[4, "image", 3, "image", 5], [2, "image", 12]]
    inputs = tiny_inputs(name, layout, model=model)
    untouched = model(**inputs).logits
    with vtc.compress(model, "expediting_vit", retention=0.6) as handle:
        together = model(**inputs).logits
    call = handle.stats.calls[0]
    assert call.visual_tokens_kept == tuple(map(float, call.visual_tokens_in))
    assert together.shape == untouched.shape and not torch.allclose(together, untouched, atol=1e-2)
    assert len({rows for _, rows in call.encoder_rows}) == 2
    with vtc.compress(model, "expediting_vit", retention=0.6):
        alone = model(**tiny_inputs(name, layout, only=1, model=model)).logits[0, -1]
    assert float((alone - together[1, -1]).abs().max()) <= LIMIT
    with vtc.compress(model, "expediting_vit", reconstruct=False, keep=9) as handle:
        model(**inputs)
    if name == "llava-clip":
        assert handle.stats.calls[0].visual_tokens_kept == (18.0, 9.0)


def test_patches_come_back_inside_the_encoder_alone(clip: Any) -> None:
    @dataclasses.dataclass(frozen=True)
    class Restores(vtc.Compressor):
        stage: Any = PRE_LLM
        rows: int = 16
        needs_budget = False

        def plan(self, model: ModelSpec) -> Plan:
            return Plan((self.stage,), Needs(), "compact")

        def select(self, view: vtc.StageView) -> Selection:
            rows = view.tokens.new_zeros(len(view.items), self.rows, view.tokens.shape[2])
            return Selection(view.items.mask, restored=rows)

    inputs = tiny_inputs("llava-clip", [[4, "image", 3]])
    for method, message in (
        (Restores(), "restored rows were given at stage 0, which encoder stages alone read; leave them out there"),
        (Restores(EncoderStage(2), 15), "restored has 15 rows, the encoder was given 16"),
    ):
        with vtc.compress(clip, method), pytest.raises(VTCError, match=message), torch.no_grad():
            clip(**inputs)
