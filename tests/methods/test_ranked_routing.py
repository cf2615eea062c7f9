"""Ranked routing: its decay against the equations, and a model whose layers are called by hand on chosen rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.app.costs import CostMeter
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Rows
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, against_oracle

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
VISUAL, FIRST = 16, 4  # of the prompt below: tokens, and place of the first one


def decay(layer: int, shift: float, layers: int = 32) -> float:
    """c_l = min(1, max(0.15, shift + cos(pi l / (L - 1)) / 2))."""
    return min(1.0, max(0.15, shift + 0.5 * math.cos(math.pi * layer / (layers - 1))))


@pytest.mark.parametrize("tokens", [576, 37])
def test_the_decay_is_that_of_the_paper(make_view: Any, tokens: int) -> None:
    """The shift 0.5, written as the share of every layer, and that shift found from its mean."""
    shares = tuple(decay(layer, 0.5) for layer in range(32))
    assert [round(shares[layer], 2) for layer in (7, 8, 16, 24, 31)] == [0.88, 0.84, 0.47, 0.15, 0.15]
    view = make_view([(1, tokens)], spec=LLAMA, keep=round(tokens * sum(shares) / 32))
    written, found = vtc.create("ranked_routing", schedule=shares), vtc.create("ranked_routing")
    assert not written.needs_budget and found.needs_budget
    for layer in range(1, 32):
        expected = math.floor(tokens * shares[layer] + 0.5)
        assert written.through(view, layer) == (expected,)
        assert abs(found.through(view, layer)[0] - expected) <= max(1, tokens // 200)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_mean_over_the_layers_meets_the_budget(nears_budget: Any, name: str) -> None:
    """Whole tokens in every layer: at the point where one more enters, several layers of several items may gain one."""
    nears_budget(name, "ranked_routing", (0.55, 0.8), lambda layers, items: 1.0 * items)


def routed(model: Any, inputs: dict[str, Tensor], shares: dict[int, int]) -> tuple[Tensor, dict[int, list[int]]]:
    """Logits of one prompt, and the visual tokens that go through each layer, by calling eager layers one by one."""
    llm = model.model.language_model
    seen: list[Tensor] = []
    hook = llm.layers[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model(**inputs)
    hook.remove()
    (hidden,) = seen
    weights: list[Tensor] = []
    hooks = [layer.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1])) for layer in llm.layers]

    def run(layer: Any, rows: Tensor, places: Tensor) -> Tensor:
        length = len(places)
        mask = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        given: Tensor = layer(
            rows, attention_mask=mask[None, None], position_embeddings=llm.rotary_emb(rows, places[None])
        )
        return given

    every, kept = torch.arange(hidden.shape[1]), {}
    for number, layer in enumerate(llm.layers):
        places = every
        if number in shares:
            run(layer, hidden, every)
            scores = weights.pop()[0, :, -1].mean(0)[FIRST : FIRST + VISUAL].tolist()
            best = sorted(sorted(range(VISUAL), key=lambda j: (-scores[j], j))[: shares[number]])
            kept[number] = best
            places = torch.tensor([p for p in every.tolist() if not 0 <= p - FIRST < VISUAL or p - FIRST in best])
        after = hidden.clone()
        after[:, places] = run(layer, hidden[:, places], places)
        hidden = after
    for each in hooks:
        each.remove()
    return model.lm_head(llm.norm(hidden)), kept


@pytest.mark.parametrize(
    ("options", "budget", "shares"),
    [
        ({"schedule": (1.0, 0.75, 0.5, 0.25)}, {}, {1: 12, 2: 8, 3: 4}),
        ({"layers": (1, 3)}, {"retention": 0.75}, {1: 8, 3: 8}),
        ({"layers": (2,)}, {"keep": 13}, {2: 4}),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_layers_called_by_hand(options: Any, budget: Any, shares: dict[int, int]) -> None:
    inputs = tiny_inputs("llava-clip", [[4, "image", 5]], seed=3)
    expected, kept = routed(tiny_model("llava-clip", attn_implementation="eager"), inputs, shares)
    model = tiny_model("llava-clip")
    with vtc.compress(model, "ranked_routing", **options, **budget) as handle:
        output = model(**inputs, use_cache=True)
    (item,) = handle.trace[0].items
    assert {stage: numbers.tolist() for stage, numbers in item.kept.items()} == kept
    assert float((output.logits - expected).abs().max()) < LIMIT
    rows = [25 - VISUAL + shares.get(layer, VISUAL) for layer in range(4)]
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == rows
    (call,) = handle.stats.calls
    assert call.layer_rows == call.kv_rows == tuple(rows)
    assert handle.stats.retention == handle.stats.cache_retention == (sum(rows) - 4 * 9) / 64


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
def test_tokens_that_reach_the_llm_route(name: str) -> None:
    """Behind a method that drops for good; the budget is a share of what it leaves."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]], seed=3, extra=1, model=model)

    def attach(model: Any) -> vtc.Handle:
        return vtc.compress(model, ["random", "ranked_routing"], retention=[0.7, 0.6])

    assert against_oracle(model, inputs, attach, 3) < LIMIT
    with attach(model) as handle:
        model(**inputs)
    assert handle.stats.retention == pytest.approx(0.42, abs=0.03)


@torch.no_grad()
def test_costs_count_the_ranking_of_all_rows_that_arrive() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 5]], seed=3, model=model)
    meter = CostMeter(model)
    full = meter.untouched(inputs, [VISUAL], [9])
    assert full is not None and meter.shape is not None
    with vtc.compress(model, "ranked_routing", schedule=(1.0, 0.75, 0.5, 0.25)) as handle:
        model(**inputs)
    (work,) = meter.compressed(full, handle, handle.stats.calls[0])
    assert work.visual.spans == ((1, 16), (1, 12), (1, 8), (1, 4))
    llm = meter.shape.llm
    projections = 2 * 25 * llm.hidden * (llm.query_width + 2 * llm.kv_width)
    assert work.method == 3 * (projections + 2 * 25 * llm.query_width)


def test_plans_and_refusals() -> None:
    method = vtc.create("ranked_routing")
    plan = method.plan(LLAMA)
    assert plan.stages == plan.skips == tuple(range(1, 32)) and plan.positions == "preserve"
    assert plan.needs == vtc.Needs(llm={layer: Rows.LAST_AHEAD for layer in range(1, 32)})
    assert method.least_retention(LLAMA) == 1 / 32
    some = vtc.create("ranked_routing", layers=(8, 20))
    assert some.plan(LLAMA).stages == some.plan(LLAMA).skips == (8, 20)
    assert some.least_retention(LLAMA) == 30 / 32
    late = vtc.create("ranked_routing", schedule=(1, 1, 0.5, 0.25))
    assert late.plan(dataclasses.replace(LLAMA, llm_layers=4)).skips == (2, 3)
    for wrong in ((), (0, 3), (3, 2), (2, 2)):
        with pytest.raises(VTCError, match="must rise and begin at 1 or later"):
            vtc.create("ranked_routing", layers=wrong)
    with pytest.raises(VTCError, match="leave out layers beside it"):
        vtc.create("ranked_routing", layers=(2, 3), schedule="cosine")
    with pytest.raises(VTCError, match="schedule='linear' is no schedule"):
        vtc.create("ranked_routing", schedule="linear")
    with pytest.raises(UnsupportedMethod, match="has one layer, which sees every token"):
        method.plan(dataclasses.replace(LLAMA, llm_layers=1))
    model = tiny_model("llava-clip")
    with pytest.raises(UnsupportedMethod, match="acts at or reads LLM layer 8"):
        vtc.compress(model, some, retention=0.9)
    with pytest.raises(BudgetError, match=r"retention=0\.5 cannot be met"):
        vtc.compress(model, "ranked_routing", layers=(2,), retention=0.5)
