"""Expediting ViT against its formulas, one patch and cluster at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import PRE_LLM, EncoderStage, ModelSpec, Needs, Plan, Selection
from vtc.methods.expediting_vit import ExpeditingViT
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.encoders import BLOCKS, PREFIX, Seen, build, by_hand, encode, pixels

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
LIMIT = 5e-5


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("expediting_vit")) == {
        "clusters": None, "layer": None, "reconstruct": True, "temperature": 0.01, "iterations": 5, "window": 5,
        "neighbours": 20, "norm": "sum",
    }  # fmt: skip
    assert ExpeditingViT().plan(CLIP_L) == Plan((EncoderStage(5), EncoderStage(23)), Needs(), "compact")
    assert ExpeditingViT(layer=9, reconstruct=False).plan(CLIP_L).stages == (EncoderStage(9),)
    with pytest.raises(UnsupportedMethod, match="'expediting_vit' works on the patches inside the vision encoder"):
        ExpeditingViT().plan(QWEN)
    with pytest.raises(UnsupportedMethod, match="layer=23: this llava encoder has blocks 0 to 22"):
        ExpeditingViT(layer=23).plan(CLIP_L)
    for options in ({"clusters": (0, 3)}, {"window": 4}, {"neighbours": 0}, {"iterations": 0}, {"norm": "l3"}):
        with pytest.raises(VTCError, match=next(iter(options))):
            vtc.create("expediting_vit", **options)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def cluster(rows: Tensor, grid: tuple[int, int], small: tuple[int, int], method: ExpeditingViT) -> list[Tensor]:
    """Clusters of the patches [H * W, D], in raster order."""
    (height, width), (h, w) = grid, small
    centres = []
    for i in range(h):
        for j in range(w):
            cell = [
                rows[r * width + c]
                for r in range(i * height // h, math.ceil((i + 1) * height / h))
                for c in range(j * width // w, math.ceil((j + 1) * width / w))
            ]
            centres.append(torch.stack(cell).mean(0))
    reach = method.window // 2
    for _ in range(method.iterations):
        sums, total = [torch.zeros_like(rows[0]) for _ in centres], [0.0] * len(centres)
        for n, x in enumerate(rows):
            own = (n // width * h // height, n % width * w // width)
            near = [k for k in range(h * w) if abs(k // w - own[0]) <= reach and abs(k % w - own[1]) <= reach]
            weights = torch.tensor([-method.temperature * distance(x, centres[k]) for k in near]).softmax(0).tolist()
            for k, weight in zip(near, weights, strict=True):
                sums[k] = sums[k] + weight * x
                total[k] += weight
        centres = [one / weight for one, weight in zip(sums, total, strict=True)]
    return centres


def rebuild(refined: Tensor, before: Tensor, centres: list[Tensor], method: ExpeditingViT) -> Tensor:
    """[N, D] a row for every patch."""
    rows = []
    for x in before:
        apart = [distance(x, centre) for centre in centres]
        near = sorted(range(len(centres)), key=lambda k: (apart[k], k))[: method.neighbours]
        weights = [math.exp(-method.temperature * (apart[k] - apart[near[0]])) for k in near]
        total = sum(weights) if method.norm == "sum" else math.sqrt(sum(w * w for w in weights))
        rows.append(sum(w / total * refined[k] for k, w in zip(near, weights, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "options", "small"),
    [
        ("CLIPModel", {}, (3, 3)),
        ("SiglipVisionModel", {"reconstruct": False}, (3, 3)),
        ("Dinov2WithRegistersModel", {"clusters": (2, 3), "window": 1, "neighbours": 2, "norm": "l2"}, (2, 3)),
        ("ViTModel", {"layer": 2, "temperature": 1.0, "window": 3, "neighbours": 3}, (3, 3)),
    ],
)
@torch.no_grad()
def test_it_is_the_plain_loop(name: str, options: Any, small: tuple[int, int]) -> None:
    model, images, lead, method = build(name), pixels(2), PREFIX[name], ExpeditingViT(**options)
    kept: dict[str, Any] = {}
    first, count = options.get("layer", 1), small[0] * small[1]

    def act(layer: int, rows: Tensor, seen: Seen | None) -> Any:
        if layer == first:
            kept["before"], kept["centres"] = rows[lead:], cluster(rows[lead:], (4, 4), small, method)
            rows = torch.cat([rows[:lead], torch.stack(kept["centres"])])
        if layer == BLOCKS and method.reconstruct:
            rows = torch.cat([rows[:lead], rebuild(rows[lead:], kept["before"], kept["centres"], method)])
        return rows, None

    untouched = encode(model, images)
    budget = {"keep": 10} if method.needs_budget else {}  # 3 x 3 is what it pays for
    last: list[Tensor] = []
    with vtc.compress(model, method, **budget) as handle:
        end = vtc.adapters.encoder_of(model).vision_layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
        together = encode(model, images)
        end.remove()
        alone = encode(model, images[1:])
    call, left = handle.stats.calls[0], 16 if method.reconstruct else count
    assert call.visual_tokens_kept == (float(left),) * 2
    assert call.layer_rows == tuple(lead + (16 if layer < first else count) for layer in range(BLOCKS))
    assert float((together[1:] - alone).abs().max()) <= LIMIT
    for image, found, rows in zip(images, together, last[0], strict=True):
        expected, expected_rows = by_hand(model, image, act)
        assert rows.shape == expected_rows.shape == (lead + left, 32)
        assert float((rows - expected_rows).abs().max()) <= LIMIT
        assert float((found - expected).abs().max()) <= LIMIT
    if method.needs_budget:
        with vtc.compress(model, method, retention=1.0):
            assert torch.equal(encode(model, images), untouched)


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
