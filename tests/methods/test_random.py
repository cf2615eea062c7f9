"""Random pruning against whole numbers drawn one by one."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

import vtc
from vtc import adapters
from vtc.errors import VTCError
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

SHAPES = [(7, 9), (1, 1), (24, 24), (2, 3), (5, 13)]


def mix(x: int) -> int:
    """The finaliser of SplitMix64 on 64-bit words."""
    x %= 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift)) * factor % 2**64
    return x


def draw(key: int, token: int, seed: int) -> int:
    """24 random bits of one token of one item."""
    return mix(mix(key + mix(seed)) + mix(token)) >> 40


def plain_random(key: int, tokens: list[int], keep: int, seed: int) -> list[int]:
    """The `keep` tokens with the highest numbers; equal ones in their order."""
    return sorted(sorted(tokens, key=lambda token: (-draw(key, token, seed), token))[:keep])


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("budget", [{"retention": 0.25}, {"retention": 1e-6}, {"keep": 7}, {"keep": 10**6}])
def test_the_plain_draw(make_view: Any, kept: Any, seed: int, budget: Any) -> None:
    view = make_view(SHAPES, **budget)
    found = kept(view, vtc.create("random", seed=seed).select(view))
    for item, (key, numbers) in enumerate(zip(view.fingerprint.tolist(), found, strict=True)):
        count = SHAPES[item][0] * SHAPES[item][1]
        assert numbers == plain_random(key, list(range(count)), view.budget.tokens(count), seed)


@pytest.mark.parametrize("scope", ["crop", "item"])
def test_crops_keep_the_same_share(make_view: Any, kept: Any, shares: Any, shape: Any, scope: Any) -> None:
    shapes = [shape(((3, 4, 5),)), shape(((1, 3, 3), (2, 2, 7)), newlines=True), (6, 6)]
    view = make_view(shapes, keep=20)
    found = kept(view, vtc.create("random", scope=scope).select(view))
    for item, (layout, key, numbers) in enumerate(
        zip(view.items.layouts, view.fingerprint.tolist(), found, strict=True)
    ):
        real = [token for token in range(layout.n_tokens) if not layout.newline[token]]
        keep = view.keep[item]
        if scope == "item":
            assert numbers == plain_random(key, real, keep, 0)
            continue
        crops = [[t for t in real if layout.crop[t] == crop] for crop in range(layout.n_crops)]
        share = shares(keep, [len(crop) for crop in crops])
        parts = [plain_random(key, crop, n, 0) for crop, n in zip(crops, share, strict=True)]
        assert numbers == sorted(token for part in parts for token in part)


def test_newlines_are_no_candidates_and_count_against_the_budget(make_view: Any, kept: Any, shape: Any) -> None:
    view = make_view([shape(((1, 2, 2), (1, 3, 4)), newlines=True)], keep=9)
    newline = view.items.layouts[0].newline
    assert view.items.fixed == (3,)
    numbers = kept(view, vtc.create("random").select(view))[0]
    assert len(numbers) == 9 - 3
    assert not newline[torch.tensor(numbers)].any()


def test_larger_budgets_keep_what_smaller_ones_kept(make_view: Any, kept: Any) -> None:
    sets = []
    for keep in (1, 5, 6, 20, 63):
        view = make_view([(7, 9)], keep=keep)
        sets.append(set(kept(view, vtc.create("random").select(view))[0]))
    assert [len(s) for s in sets] == [1, 5, 6, 20, 63]
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_items_and_seeds_differ(make_view: Any, kept: Any) -> None:
    view = make_view([(8, 8)] * 6, keep=16)
    sets = {tuple(numbers) for seed in range(4) for numbers in kept(view, vtc.create("random", seed=seed).select(view))}
    assert len(sets) == 24


def test_every_token_is_kept_equally_often(make_view: Any, kept: Any) -> None:
    times: Counter[int] = Counter()
    view = make_view([(3, 5)] * 40, keep=4)
    for seed in range(60):
        for numbers in kept(view, vtc.create("random", seed=seed).select(view)):
            times.update(numbers)
    expected = 40 * 60 * 4 / 15
    assert sorted(times) == list(range(15))
    assert max(abs(count - expected) for count in times.values()) < 5 * (expected * (1 - 4 / 15)) ** 0.5


def test_the_draw_follows_the_pixels_not_the_batch() -> None:
    """The same image alone, in a batch, twice in one prompt and under beams keeps the same tokens."""
    name = "llava-clip"
    model = tiny_model(name)

    def numbers(layout: Any, **changes: Any) -> list[list[int]]:
        inputs = tiny_inputs(name, layout, seed=1)
        pixels = changes.pop("pixels", None)
        if pixels is not None:
            inputs["pixel_values"] = pixels
        with vtc.compress(model, "random", retention=0.25) as handle, torch.no_grad():
            model.generate(**inputs, max_new_tokens=1, do_sample=False, **changes)
        return [item.kept[0].tolist() for item in handle.trace[0].items]

    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    alone = [numbers([[3, "image", 5]], pixels=images[i : i + 1])[0] for i in range(3)]
    assert len({tuple(each) for each in alone}) == 3
    assert numbers([[9, "image", 1], [2, "image", 4, "image"]], pixels=images[[2, 0, 1]]) == [
        alone[i] for i in (2, 0, 1)
    ]
    assert numbers([[2, "image", 4, "image"]], pixels=images[[1, 1]]) == [alone[1]] * 2
    assert numbers([[2, "image", 4]], pixels=images[:1], num_beams=3) == [alone[0]] * 3


@pytest.mark.parametrize("name", TINY_MODELS)
def test_defaults(name: str) -> None:
    method = vtc.create("random")
    assert (method.seed, method.scope) == (0, "crop")
    model = tiny_model(name)
    with vtc.compress(model, method, retention=0.5) as handle:
        assert handle.plan.stages == (vtc.PRE_LLM,)
        assert handle.plan.needs == vtc.Needs()
        assert handle.positions == ("preserve" if adapters.of(model).spec.mrope else "compact")


def test_other_scopes_are_refused() -> None:
    with pytest.raises(VTCError, match="unknown scope 'crops'; did you mean 'crop'"):
        vtc.create("random", scope="crops")
