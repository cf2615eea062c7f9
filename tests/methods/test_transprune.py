"""TransPrune against the blocks of the model's own layers, one token at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Rows
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
PUBLISHED = (0.875, 0.625, 0.125)
LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


def left(view: Any, **options: Any) -> list[list[int]]:
    """Tokens of each item before and behind every stage."""
    method: Any = vtc.create("transprune", **options)
    counts = [view.items.counts]
    for start in method.starts(view.model):
        here = dataclasses.replace(view.items, counts=counts[-1])
        counts.append(method.left(dataclasses.replace(view, items=here), start))
    return [list(column) for column in zip(*counts, strict=True)]


def test_the_published_setting_and_its_mean(make_view: Any) -> None:
    assert not vtc.create("transprune", ratios=PUBLISHED).needs_budget
    view = make_view([(24, 24), (1, 1)], spec=LLAMA)
    assert left(view, ratios=PUBLISHED) == [[576, 504, 360, 72], [1, 1, 1, 1]]
    mean = (7 * 576 + 2 * 504 + 3 * 360 + 20 * 72) / 32
    assert round(mean / 576, 2) == 0.41
    for budget in ({"keep": 236}, {"retention": 0.41}):
        assert left(make_view([(24, 24)], spec=LLAMA, **budget)) == [[576, 504, 360, 72]]
    with pytest.raises(BudgetError, match="7 of 32 LLM layers see 576 tokens"):
        left(make_view([(24, 24)], spec=LLAMA, retention=0.2))


@pytest.mark.parametrize("keep", [575, 400, 300, 236, 200, 190, 180, 150, 130])
def test_other_budgets_scale_what_leaves_and_then_what_stays(make_view: Any, keep: int) -> None:
    """The last stage's share by bisection; where even none of it is too much, a factor of the two others."""
    low, high = 0.0, 2.0
    for _ in range(60):
        x = (low + high) / 2
        last = max(0.0, x - 1)
        factor = min(1.0, x)
        shares = [factor * (1 - (1 - last) / 7), factor * (1 - 3 * (1 - last) / 7), last]
        mean = (7 + 2 * shares[0] + 3 * shares[1] + 20 * max(1 / 576, shares[2])) / 32
        low, high = (x, high) if mean < keep / 576 else (low, x)
    (counts,) = left(make_view([(24, 24)], spec=LLAMA, keep=keep))
    assert counts[1:] == pytest.approx([576 * share for share in shares[:2]] + [max(1, 576 * last)], abs=2.5)
    assert abs(sum(span * count for span, count in zip((7, 2, 3, 20), counts, strict=True)) / 32 - keep) <= 0.5


def test_stages_that_fall_together_leave_what_the_last_of_them_does(make_view: Any) -> None:
    """Layers 7 and 9 of 32 are layer 1 of 4; other layers than the published ones leave lambda, lambda^2, ...."""
    shallow = dataclasses.replace(LLAMA, llm_layers=4)
    (counts,) = left(make_view([(24, 24)], spec=shallow, retention=(1 + 5 / 8 + 2 / 8) / 4))
    assert counts == [576, 360, 72]
    (counts,) = left(make_view([(24, 24)], spec=LLAMA, retention=0.5), layers=(8, 16))
    assert counts[2] / counts[1] == pytest.approx(counts[1] / 576, abs=0.01)


def transitions(blocks: list[tuple[Tensor, Tensor]], prompt: list[int]) -> dict[int, float]:
    """Of each place in a prompt, what several blocks, given and answering [L, D], add up to."""
    total = dict.fromkeys(prompt, 0.0)
    for before, after in blocks:
        before, after = before.double(), after.double()
        weight = {j: math.exp(1 - float(torch.cosine_similarity(before[j], after[j], dim=0))) for j in prompt}
        for j in prompt:
            total[j] += float(after[j].norm() / before[j].norm()) * weight[j] / sum(weight.values())
    return total


def shares(values: list[float]) -> list[float]:
    return [value / (sum(values) + 1e-8) for value in values]


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


class Watch:
    """What goes into and out of the blocks of a tiny model's layers: [B, L, D] each, by layer."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.hooks = []
        for number, layer in enumerate(model.model.language_model.layers):
            for block in (layer.self_attn, layer.mlp):

                def note(module: Any, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
                    before = args[0] if args else kwargs["hidden_states"]
                    after = output[0] if isinstance(output, tuple) else output
                    self.seen.setdefault(number, []).append((before, after))

                self.hooks.append(block.register_forward_hook(note, with_kwargs=True))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("question", [True, False])
@torch.no_grad()
def test_the_first_stage_by_hand(name: str, question: bool, llm_weights: Any) -> None:
    """Four layers: tokens leave before layer 2, transitions are those of layer 1, the question's rows of layer 2."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUT, seed=2, model=model)
    with Watch(model) as watch:
        model(**inputs)
    weights = llm_weights(name, inputs)[2]
    views: list[Any] = []
    method: Any = vtc.create("transprune", layers=(16,), ratios=(0.5,), question=question)
    select = type(method).select
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "select", lambda self, view: views.append(view) or select(self, view))
        with vtc.compress(model, method) as handle:
            model(**inputs)
    (view,) = views
    for item in handle.trace[0].items:
        row, places = item.row, item.positions.tolist()
        prompt = inputs["attention_mask"][row].nonzero()[:, 0].tolist()
        moved = transitions([(before[row], after[row]) for before, after in watch.seen[1]], prompt)
        scores = shares([moved[place] for place in places])
        if question:
            behind = int(view.visual[row].nonzero()[0])
            asking = [i for i in prompt if i > behind and view.text[row, i]]
            paid = [float(weights[row, :, asking, place].mean()) for place in places]
            scores = [a + b for a, b in zip(scores, shares(paid), strict=True)]
        assert item.kept[2].tolist() == best(scores, max(1, int(len(places) * 0.5)))


@torch.no_grad()
def test_later_stages_add_the_layers_in_between() -> None:
    """Before layers 1 and 3: transitions of layer 0, then those of 0, 1 and 2, the later ones of what is left."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 5]], seed=2)
    method = vtc.create("transprune", layers=(8, 24), ratios=(0.5, 0.25), question=False)
    with vtc.compress(model, method) as handle, Watch(model) as watch:
        model(**inputs)
    (item,) = handle.trace[0].items
    length, places = inputs["input_ids"].shape[1], item.positions.tolist()
    early = transitions([(before[0], after[0]) for before, after in watch.seen[0]], list(range(length)))
    first = best([early[place] for place in places], len(places) // 2)
    assert item.kept[1].tolist() == first
    here = list(range(4 + len(first) + 5))
    late = transitions([(before[0], after[0]) for layer in (1, 2) for before, after in watch.seen[layer]], here)
    scores = [early[places[j]] + late[4 + n] for n, j in enumerate(first)]
    assert item.kept[3].tolist() == [first[n] for n in best(scores, len(places) // 4)]


@torch.no_grad()
def test_without_a_question_transitions_rank() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image"]], seed=2)
    kept = []
    for question in (True, False):
        with vtc.compress(model, vtc.create("transprune", question=question), retention=0.6) as handle:
            model(**inputs)
        kept.append(handle.trace[0].items[0].kept[2].tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str, nears_budget: Any) -> None:
    nears_budget(name, "transprune", (0.5, 0.9))


def test_plans_and_refusals() -> None:
    method: Any = vtc.create("transprune")
    assert dataclasses.asdict(method) == {"layers": (7, 9, 12), "ratios": None, "schedule": None, "question": True}
    plan = method.plan(LLAMA)
    assert (plan.stages, plan.positions) == ((7, 9, 12), "compact")
    both = (Rows.TRANSITION, Rows.QUESTION_AHEAD)
    moves = {layer: (Rows.TRANSITION,) for layer in (6, 8, 10, 11)}
    assert plan.needs.llm == {**moves, 7: both, 9: both, 12: (Rows.QUESTION_AHEAD,)}
    alone = vtc.create("transprune", question=False).plan(dataclasses.replace(LLAMA, mrope=True))
    assert alone.needs.llm == dict.fromkeys(range(6, 12), (Rows.TRANSITION,))
    assert alone.positions == "preserve"
    assert method.starts(dataclasses.replace(LLAMA, llm_layers=28)) == (6, 8, 11)
    assert method.starts(dataclasses.replace(LLAMA, llm_layers=4)) == (1, 2)
    with pytest.raises(VTCError, match="must rise, begin at 1 or later and end at 31"):
        vtc.create("transprune", layers=(3, 32))
    with pytest.raises(UnsupportedMethod, match="are 2 of this llava model's 4 LLM layers"):
        vtc.create("transprune", ratios=PUBLISHED).plan(dataclasses.replace(LLAMA, llm_layers=4))
