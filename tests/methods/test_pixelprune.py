"""PixelPrune against a walk over the patches of one picture at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.engine.encoder import context_of
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec, Needs, Plan, Rows
from vtc.methods.pixelprune import PixelPrune
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.encoders import drawn
from vtc.testing.inside.pixelprune import cut, walk

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
LIMIT = 5e-5


def test_plan_and_refusals() -> None:
    assert PixelPrune().plan(CLIP_L) == Plan((EncoderStage(0),), Needs({-1: Rows.PIXELS}), "compact")
    assert not PixelPrune().needs_budget and not PixelPrune(tau=0.1).needs_budget and PixelPrune(tau=None).needs_budget
    with pytest.raises(UnsupportedMethod, match="'pixelprune' works on the patches inside the vision encoder"):
        PixelPrune().plan(QWEN)
    for options in ({"tau": -1.0}, {"metric": "min"}):
        with pytest.raises(VTCError, match=next(iter(options))):
            vtc.create("pixelprune", **options)


@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
@pytest.mark.parametrize("tau", [0.0, 0.06, 0.3])
def test_the_selection_is_that_of_the_walk(metric: Any, tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    method = PixelPrune(tau=tau, metric=metric)
    for shape in ((1, 1), (1, 6), (5, 1), (7, 9)):
        cells = torch.randint(0, 3, (4, *shape, 1), generator=generator) + torch.zeros(4)
        cells = cells + (torch.rand(cells.shape, generator=generator) * 0.2 if tau else 0)
        found = method.scan(cells, tau) if tau else method.residuals(cells) > 0
        for one, stays in zip(cells, found, strict=True):
            assert stays.flatten().nonzero().flatten().tolist() == walk(one, tau, metric)[0]


def test_it_runs_in_front_of_an_llm_and_pictures_differ() -> None:
    model, layout = tiny_model("llava-clip"), [[4, "image", 3], [2, "image", 12]]
    inputs = tiny_inputs("llava-clip", layout)
    side = inputs["pixel_values"].shape[-1]
    inputs["pixel_values"] = drawn(5, side=side // 4)
    with torch.no_grad(), vtc.compress(model, "pixelprune") as handle:
        together = model(**inputs).logits[:, -1]
    kept = handle.stats.calls[0].visual_tokens_kept
    assert kept[0] == 16.0 and 1 < kept[1] < 16  # noise stays
    alone = tiny_inputs("llava-clip", layout, only=1)
    alone["pixel_values"] = inputs["pixel_values"][1:]
    with torch.no_grad(), vtc.compress(model, "pixelprune"):
        assert float((model(**alone).logits[0, -1] - together[1]).abs().max()) <= LIMIT


def pictures(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with drawn pictures of 4 x 4 squares, the same for every number of them."""
    tiles, _, side, _ = inputs["pixel_values"].shape
    return {**inputs, "pixel_values": drawn(5, batch=tiles, side=side // 4)}


@torch.no_grad()
def test_squares_that_make_one_token_leave_together() -> None:
    """InternVL: the tower by hand on fewer patches, its rows at their places again, pixel shuffle and projector."""
    model = tiny_model("internvl")
    images, backbone = drawn(5, batch=3), model.model
    lefts = [walk(cut(image), 0.0, "max")[0] for image in images]
    with vtc.compress(model, "pixelprune"):
        found = backbone.get_image_features(
            images, vision_feature_layer=-1, vision_feature_select_strategy="default", return_dict=True
        ).pooler_output
    tower = backbone.vision_tower
    embedded = tower.embeddings(images)
    embedded = embedded[0] if isinstance(embedded, tuple) else embedded
    for image, left, rows in zip(embedded, lefts, found, strict=True):
        patches = [16 * (n // 4) + 8 * i + 2 * (n % 4) + j for n in left for i in range(2) for j in range(2)]
        x = image[None, [0, *(1 + n for n in sorted(patches))]]
        for layer in tower.encoder.layer:
            x = layer(x)
        x = tower.layernorm(x)
        full = torch.zeros(64, x.shape[2]).index_copy(0, torch.tensor(sorted(patches)), x[0, 1:])
        shuffled = backbone.pixel_shuffle(full.view(1, 8, 8, -1), scale_factor=0.5).flatten(1, 2)
        expected = backbone.multi_modal_projector(shuffled)[0]
        assert 1 < len(left) <= 16
        assert float((rows[left] - expected[left]).abs().max()) <= LIMIT


@torch.no_grad()
def test_tiles_and_prompts_of_internvl_differ() -> None:
    model, layout = tiny_model("internvl"), [[4, "image", 3], [2, "image", 12], [9]]
    inputs = pictures(tiny_inputs("internvl", layout, model=model))
    with vtc.compress(model, "pixelprune") as handle:
        together = model(**inputs).logits[:, -1]
    call, tiles = handle.stats.calls[0], len(inputs["pixel_values"])
    kept = [len(walk(cut(image), 0.0, "max")[0]) for image in inputs["pixel_values"]]
    assert sum(call.visual_tokens_kept) == sum(kept) < 16 * tiles
    first = int(call.visual_tokens_in[0]) // 16
    alone = tiny_inputs("internvl", layout, only=1, model=model)
    alone["pixel_values"] = inputs["pixel_values"][first:]
    with vtc.compress(model, "pixelprune"):
        assert float((model(**alone).logits[0, -1] - together[1]).abs().max()) <= LIMIT
    with vtc.compress(model, "pixelprune", tau=None, retention=0.5) as handle:
        model(**inputs)
    assert handle.stats.calls[0].visual_tokens_kept[:2] == (8.0 * first, 8.0 * (tiles - first))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_squares_of_a_packed_encoder(name: str) -> None:
    """Every frame is a picture, and what the processor wrote side by side is a square; pictures may differ in size."""
    model, generator = tiny_model(name), torch.Generator().manual_seed(2)
    grids = [(1, 8, 12), (2, 4, 6), (1, 8, 12)]
    cells = [torch.randint(0, 2, (t, h // 2, w // 2, 1), generator=generator) for t, h, w in grids]
    pixels = torch.cat([one.expand(-1, -1, -1, 4 * 96).reshape(-1, 96) for one in cells]).float()
    for method, tau in (("pixelprune", 0.0), (PixelPrune(tau=0.06), 0.06)):
        noisy = pixels + (torch.rand(pixels.shape, generator=generator) * 0.05 if tau else 0)
        squares = torch.split(noisy.view(-1, 4 * 96), [t * h * w // 4 for t, h, w in grids])
        expected = []
        for (t, h, w), square in zip(grids, squares, strict=True):
            for number, frame in enumerate(square.view(t, h // 2, w // 2, -1)):
                kept = walk(frame, tau, "max")[0]
                expected.append([number * (h // 2) * (w // 2) + n for n in kept])
        with vtc.compress(model, method):
            output = model.model.get_image_features(noisy, torch.tensor(grids), return_dict=True)
        context = context_of(output)
        assert context is not None and context.alive is not None
        found = [row.nonzero().flatten().tolist() for row in context.alive[0]]
        assert found == [expected[0], expected[1] + expected[2], expected[3]]
        assert sum(map(len, found)) < len(noisy) // 4
