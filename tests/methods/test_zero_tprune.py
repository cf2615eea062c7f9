"""Zero-TPrune against its steps, one image, head and token at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import EncoderStage, ModelSpec
from vtc.methods.zero_tprune import GRAPH, ZeroTPrune, importance
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.encoders import BLOCKS, PATCHES, PREFIX, Seen, build, by_hand, encode, pixels

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


# --- the plain loops
def page_rank(query: Tensor, key: Tensor, rounds: int, lead: int, has_cls: bool, variance: Any) -> list[float]:
    """Importance of the patches from queries and keys [T, H, d] of the tokens that are there."""
    count, heads = len(query), query.shape[1]
    scores = []
    for head in range(heads):
        s = [1 / count] * count
        if has_cls:
            s[0] = math.sqrt(count) / count
        rows = [(query[i, head] @ key[:, head].T / math.sqrt(8)).softmax(-1).double() for i in range(count)]
        for _ in range(rounds):
            s = [sum(float(rows[i][j]) * s[i] for i in range(count)) for j in range(count)]
        scores.append(s[lead:])

    def spread(s: list[float]) -> float:
        scaled = [count * each for each in s]
        mean = sum(scaled) / len(scaled)
        return sum((each - mean) ** 2 for each in scaled) / len(scaled)

    passed = [s for s in scores if variance[0] <= spread(s) <= variance[1]] or scores
    return [math.sqrt(sum(s[n] ** 2 for s in passed) / len(passed)) for n in range(count - lead)]


def prune(seen: Seen, lead: int, alike: int, little: int, rounds: int, has_cls: bool, variance: Any) -> list[int]:
    """The patches that stay, of those in front of a pruning layer."""
    given = page_rank(seen.query, seen.key, rounds, lead, has_cls, variance)
    order = sorted(range(len(given)), key=lambda n: (-given[n], n))
    half = (len(given) + 1) // 2
    important, others = order[:half], order[half:]

    def cosine(a: int, b: int) -> float:
        return float(torch.cosine_similarity(seen.key[lead + a].mean(0), seen.key[lead + b].mean(0), dim=0))

    others.sort(key=lambda n: (-max(cosine(n, b) for b in important), n))
    left = sorted(set(range(len(given))) - set(others[:alike]))
    rows = torch.tensor([*range(lead), *(lead + n for n in left)])
    again = page_rank(seen.query[rows], seen.key[rows], rounds, lead, has_cls, variance)
    ranks = sorted(range(len(left)), key=lambda n: (-again[n], n))
    return sorted(left[n] for n in ranks[: len(left) - little])


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("CLIPModel", (0.01, 0.7)),
        ("SiglipVisionModel", (0.01, 0.7)),
        ("ViTModel", (0.2, 0.4)),  # few heads
        ("Dinov2WithRegistersModel", (50.0, 60.0)),  # none
    ],
)
@torch.no_grad()
def test_what_is_left_is_that_of_the_plain_loop(name: str, variance: Any) -> None:
    model, images, lead = build(name), pixels(2), PREFIX[name]
    method, has_cls = ZeroTPrune(similar=2, iterations=(7, 4, 1), variance=variance), PREFIX[name] > 0
    plan = dict(zip((1, 2), method.leaving(PATCHES, 7, 2), strict=True))

    def act(layer: int, rows: Tensor, seen: Seen | None) -> Any:
        if layer in plan and seen is not None:
            rounds = method.iterations[3 * (layer - 1) // BLOCKS]
            left = prune(seen, lead, *plan[layer], rounds, has_cls, variance)
            rows = torch.cat([rows[:lead], rows[[lead + n for n in left]]])
        return rows, None

    untouched = encode(model, images)
    with vtc.compress(model, method, keep=7) as handle:
        together = encode(model, images)
        alone = encode(model, images[1:])
    assert handle.stats.calls[0].visual_tokens_kept == (7.0, 7.0)
    assert float((together[1:] - alone).abs().max()) <= LIMIT
    with vtc.compress(model, method, retention=1.0):
        assert torch.equal(encode(model, images), untouched)
    for image, found in zip(images, together, strict=True):
        expected, rows = by_hand(model, image, act)
        assert len(rows) == lead + 7
        assert float((found - expected).abs().max()) <= LIMIT


def test_heads_are_joined_by_their_root_mean_square() -> None:
    mass = torch.tensor([[[0.25, 0.25], [0.1, 0.4], [0.5, 0.0]]])
    found = importance(mass, torch.ones(1, 2, dtype=torch.bool), torch.tensor([4]), (0.01, 0.7))
    assert torch.allclose(found, torch.tensor([[0.1, 0.4]]))  # one head is even, one too uneven


def test_it_runs_in_front_of_an_llm() -> None:
    model, layout = tiny_model("llava-clip"), [[4, "image", 3, "image", 5], [2, "image", 12]]
    with torch.no_grad(), vtc.compress(model, "zero_tprune", retention=0.5) as handle:
        model(**tiny_inputs("llava-clip", layout))
    assert handle.stats.calls[0].visual_tokens_kept == (16.0, 8.0)
