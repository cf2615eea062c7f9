"""DiffRate against its steps, one image and token at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec, Rows
from vtc.methods.diffrate import PUBLISHED, DiffRate
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.encoders import BLOCKS, PATCHES, PREFIX, Seen, build, by_hand, encode, pixels

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


def tail(rows: list[Tensor], sizes: list[float], score: list[float], pruned: int, left: int) -> tuple[Any, Any]:
    """Rows and sizes of what one block leaves, in the order of the picture."""
    order = sorted(range(len(rows)), key=lambda n: (-score[n], n))[:pruned]
    first = sorted(order[:left])
    members, grown = {n: [rows[n]] for n in first}, {n: sizes[n] for n in first}
    for n in order[left:]:
        alike = {goal: float(torch.cosine_similarity(rows[n], rows[goal], dim=0)) for goal in first}
        best = max(first, key=lambda goal: (alike[goal], -goal))
        members[best].append(rows[n])
        grown[best] += alike[best] * sizes[n]
    return [torch.stack(members[n]).mean(0) for n in first], [grown[n] for n in first]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CLIPModel", {}),
        ("SiglipVisionModel", {"share": 0.2}),
        ("Dinov2WithRegistersModel", {"proportional": False}),
        ("ViTModel", {"prune": (17, 13, 9), "merge": (15, 11, 6)}),
    ],
)
@torch.no_grad()
def test_what_is_left_is_that_of_the_plain_loop(name: str, options: Any) -> None:
    model, images, lead, method = build(name), pixels(2), PREFIX[name], DiffRate(**options)
    budget = {"keep": 5} if method.needs_budget else {}
    plan = method.steps(BLOCKS, PATCHES, 5, int(lead > 0))
    kept: list[float] = []

    def act(layer: int, rows: Tensor, seen: Seen | None) -> Any:
        if seen is None:
            kept[:] = [1.0] * PATCHES
            return rows, None
        weights = seen.attention.mean(0)
        score = (weights[0] if lead else weights.mean(0))[lead:]
        patches, sizes = tail(list(rows[lead:]), kept, score.tolist(), *plan[layer - 1])
        kept[:] = sizes
        log = torch.tensor([1.0] * lead + [max(size, 1e-6) for size in sizes])
        return torch.cat([rows[:lead], torch.stack(patches)]), log if method.proportional else None

    untouched = encode(model, images)
    with vtc.compress(model, method, **budget) as handle:
        together = encode(model, images)
        alone = encode(model, images[1:])
    assert handle.stats.calls[0].visual_tokens_kept == (5.0, 5.0)
    assert float((together[1:] - alone).abs().max()) <= LIMIT
    with vtc.compress(model, "diffrate", retention=1.0):
        assert torch.equal(encode(model, images), untouched)
    for image, found in zip(images, together, strict=True):
        expected, rows = by_hand(model, image, act)
        assert len(rows) == lead + 5
        assert float((found - expected).abs().max()) <= LIMIT


def test_gradients_pass_and_it_runs_in_front_of_an_llm() -> None:
    model, layout = tiny_model("llava-siglip"), [[4, "image", 3, "image", 5], [2, "image", 12]]
    with vtc.compress(model, "diffrate", retention=0.5) as handle:
        model(**tiny_inputs("llava-siglip", layout)).logits[:, -1].square().sum().backward()
    assert handle.stats.calls[0].visual_tokens_kept == (16.0, 8.0)
    embedding = next(model.model.vision_tower.parameters()).grad
    assert embedding is not None and float(embedding.abs().max()) > 0
