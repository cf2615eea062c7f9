"""FitPrune against the attention of the model's own layers, and its recipe against a plain loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method import weights as store
from vtc.method.base import ModelSpec, Needs
from vtc.method.schedule import Profiles, Schedule
from vtc.methods.fitprune.method import SUMS
from vtc.methods.fitprune.recipe import STEPS, left_behind, recipe
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


def plain_left(own: list[list[float]], cross: list[list[float]], share: float) -> list[int]:
    """Tokens left behind each layer, one token at a time."""
    there, left = list(range(len(own[0]))), []
    for layer in zip(own, cross, strict=True):
        sets = []
        for values in layer:
            lost, leaves = 0.0, set()
            for j in sorted(there, key=lambda j, values=values: (values[j], j)):
                lost += values[j]
                if lost > share * sum(values) + 1e-9 * sum(values):
                    break
                leaves.add(j)
            sets.append(leaves)
        there = [j for j in there if j not in sets[0] & sets[1]]
        left.append(len(there))
    return left


def sums(seed: int, layers: int, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Made-up attention of items padded to the largest, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    own, cross = torch.rand(2, layers, len(sizes), max(sizes), generator=generator, dtype=torch.float64) ** 4
    return own, cross, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]


def test_the_plain_recipe() -> None:
    sizes = [17, 1, 40]
    own, cross, mask = sums(1, 5, sizes)
    found = left_behind(own, cross, mask, 10)
    assert found.shape == (11, 5, 3)
    for item, size in enumerate(sizes):
        for step in range(11):
            rows = own[:, item, :size].tolist(), cross[:, item, :size].tolist()
            assert found[step, :, item].tolist() == plain_left(*rows, step / 10)
    assert not found[-1].any()
    shares = recipe(found, torch.tensor(sizes))
    assert bool((shares[0] == 1).all()) and not shares[-1].any()
    assert bool((shares.diff(dim=0) <= 0).all()) and bool((shares.diff(dim=1) <= 0).all())
    middle = (found[5].double() / torch.tensor(sizes)).mean(1)
    assert float((shares[5] - middle).max()) <= 0


def test_what_leaves_lies_in_both_sets() -> None:
    """Tokens that one of the two sums needs stay, however little the other one needs them."""
    own = torch.tensor([[[0.5, 0.4, 0.05, 0.05]]], dtype=torch.float64)
    left = left_behind(own, own.flip(2), torch.ones(1, 4, dtype=torch.bool), 10)
    assert left[:, 0, 0].tolist() == [*[4] * 5, *[2] * 5, 0]


@pytest.mark.parametrize("keep", [30, 100, 192, 400, 560, 576])
def test_a_recipe_meets_every_budget(keep: int) -> None:
    own, cross, mask = sums(2, 31, [576] * 2)
    rows = tuple(map(tuple, recipe(left_behind(own, cross, mask), torch.tensor([576, 576])).tolist()))
    schedule = Schedule(tuple(range(1, 32)), 32, Profiles(rows))
    counts = [576, *schedule.left(576, keep, 0, 576).values()] if keep < 576 else [576] * 32
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert abs(sum(counts) / 32 - keep) <= 0.5
    with pytest.raises(BudgetError, match="1 of 32 LLM layers see 576 tokens"):
        schedule.left(576, 15, 0, 576)


def test_the_least_leave(make_view: Any, kept: Any) -> None:
    """What both attend to most is kept; a release of another project keeps the others."""
    generator = torch.Generator().manual_seed(4)
    method: Any = vtc.create("fitprune", schedule=(*[1.0] * 3, *[0.3] * 29))
    view = make_view([(7, 9), (5, 5), (1, 1)], spec=LLAMA, stage=3)
    read = torch.rand(2, *view.hidden.shape[:2], generator=generator).mul(20).round()  # with ties
    view = dataclasses.replace(view, llm_rows={(2, SUMS): read}, needs=Needs(llm={2: SUMS}))
    own, cross = view.llm_attention(2, SUMS)
    selection = method.select(view)
    for item, (numbers, count) in enumerate(zip(kept(view, selection), view.items.counts, strict=True)):
        product = (own[item] * cross[item])[:count].tolist()
        assert numbers == best(product, max(1, int(count * 0.3 + 0.5)))
    early = dataclasses.replace(view, stage=2, memory={})
    assert method.select(early) is None


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl"])
@torch.no_grad()
def test_the_kept_set_is_that_of_the_models_own_attention(name: str, llm_weights: Any, limits: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUT, seed=2, model=model)
    views: list[Any] = []
    method: Any = vtc.create("fitprune", schedule=(1.0, 1.0, 0.4, 0.2))
    select = type(method).select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "select", lambda self, view: views.append(view) or select(self, view))
        with vtc.compress(model, method) as handle:
            model(**inputs)
    highest, view = llm_weights(name, inputs)[1].amax(1), views[0]
    for number, item in enumerate(handle.trace[0].items):
        row, places = item.row, item.positions.tolist()
        visual = view.visual[row].nonzero()[:, 0].tolist()
        asking = [i for i in view.text[row].nonzero()[:, 0].tolist() if i > visual[0]]
        own, cross = (highest[row, some].sum(0)[places] for some in (visual, asking))
        read = view.llm_attention(1, SUMS)[:, number, : len(places)]
        assert float((read - torch.stack([own, cross])).abs().max()) <= 10 * limits.attention
        assert item.kept[2].tolist() == best((own * cross).tolist(), int(len(places) * 0.4 + 0.5))
        assert len(item.kept[3]) == max(1, int(len(places) * 0.2 + 0.5))
        assert set(item.kept[3].tolist()) < set(item.kept[2].tolist())


@torch.no_grad()
def test_without_a_question_the_image_ranks(llm_weights: Any) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image"]], seed=2)
    with vtc.compress(model, vtc.create("fitprune", schedule=(1.0, 0.5, 0.5, 0.5))) as handle:
        model(**inputs)
    (item,) = handle.trace[0].items
    places = item.positions.tolist()
    own = llm_weights("llava-clip", inputs)[0].amax(1)[0, places].sum(0)[places]
    assert item.kept[1].tolist() == best(own.tolist(), len(places) // 2)


@torch.no_grad()
def test_a_calibration_is_a_file(tmp_path: Path) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=2)
    spec = adapters.of(model).spec
    own, cross, mask = sums(3, 3, [16])
    left = recipe(left_behind(own, cross, mask), torch.tensor([16]))
    file = store.save(tmp_path / "recipe.safetensors", {"left": left}, vtc.create("fitprune").settings(spec))
    method = vtc.create("fitprune", weights=file)
    with vtc.compress(model, method, retention=0.6) as handle:
        model(**inputs)
    (call,) = handle.stats.calls
    schedule = Schedule((1, 2, 3), 4, Profiles(tuple(map(tuple, left.float().tolist()))))
    expected = schedule.left(16, 10, 0, 16).values()
    assert [len(handle.trace[0].items[0].kept[stage]) for stage in (1, 2, 3)] == list(expected)
    assert call.visual_tokens_kept[1] == pytest.approx(10, abs=0.5)
    with vtc.compress(model, "fitprune", retention=0.6) as handle:
        model(**inputs)
    assert [len(handle.trace[0].items[0].kept[stage]) for stage in (1, 2, 3)] != list(expected)
    assert method.described()["weights_digest"] == store.digest(file)
    other = store.save(tmp_path / "other.safetensors", {"left": left}, {"method": "fitprune", "num_layers": "32"})
    with pytest.raises(VTCError, match="were made with num_layers='32', this run has num_layers='4'"):
        vtc.compress(model, vtc.create("fitprune", weights=other), retention=0.6)
    short = store.save(tmp_path / "short.safetensors", {"left": left[1:]}, method.settings(spec))
    with pytest.raises(VTCError, match=rf"hold 'left' of shape \({STEPS}, 3\)"):
        vtc.compress(model, vtc.create("fitprune", weights=short), retention=0.6)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str, nears_budget: Any) -> None:
    nears_budget(name, "fitprune", (0.5, 0.9))


def test_plans_and_refusals() -> None:
    method = vtc.create("fitprune")
    assert dataclasses.asdict(method) == {"schedule": None, "weights": None}
    plan = method.plan(LLAMA)
    assert plan == vtc.Plan(tuple(range(1, 32)), Needs(llm=dict.fromkeys(range(31), SUMS)), "preserve")
    assert method.least_retention(LLAMA) == 1 / 32
    with pytest.raises(UnsupportedMethod, match="has one layer; nothing can be dropped inside"):
        method.plan(dataclasses.replace(LLAMA, llm_layers=1))
    fewer = vtc.create("fitprune", schedule=(1, 1, 0.5, 0.25)).plan(LLAMA)
    assert fewer.needs == Needs(llm={15: SUMS, 25: SUMS}) and fewer.stages == (16, 26)
    with pytest.raises(VTCError, match="schedule says where tokens leave and how many; leave out weights beside it"):
        vtc.create("fitprune", schedule=(1, 0.5), weights="some.safetensors")
