"""DART against its rule, one pivot and one token at a time, and against the model's own keys and hidden states."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import BudgetError, VTCError
from vtc.method.base import ModelSpec
from vtc.method.readings import AttentionCall
from vtc.methods.dart import SIZES, least_alike
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


def cosine(a: Tensor, b: Tensor) -> float:
    return round(float(a.double() @ b.double() / (a.double().norm() * b.double().norm())), 9)


def plain_choice(
    y: Tensor, sizes: list[float], text: Tensor, text_sizes: list[float], keep: int, pivots: tuple[int, int] = (4, 4)
) -> list[int]:
    """y [n, D] and text [m, D]: pivots by falling size, then for each its share of the lowest cosines."""
    order = sorted(range(len(y)), key=lambda j: (-sizes[j], j))
    kept = order[: min(pivots[0], keep)]
    spoken = sorted(range(len(text)), key=lambda j: (-text_sizes[j], j))[: pivots[1]]
    walk = [y[j] for j in kept] + [text[j] for j in spoken]
    for number, pivot in enumerate(walk):
        share = math.ceil((keep - len(kept)) / (len(walk) - number))
        free = [j for j in range(len(y)) if j not in kept]
        kept = kept + sorted(free, key=lambda j: (cosine(pivot, y[j]), j))[:share]
    return sorted(kept)


def norm(rows: Tensor) -> Tensor:
    """An RMS norm whose weights turn directions."""
    weight = torch.linspace(0.2, 3, rows.shape[-1])
    return weight * rows / rows.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("budget", [{"retention": 0.2}, {"retention": 0.5}, {"keep": 40}], ids=str)
@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (2, 3), (9, 1)])
def test_the_plain_choice_inside(make_view: Any, kept: Any, budget: Any, pivots: Any) -> None:
    view = make_view(SHAPES, stage=2, spec=LLAMA, **budget)
    sizes = torch.rand(view.visual.shape, generator=torch.Generator().manual_seed(1)).mul(30).round()  # with ties
    view = dataclasses.replace(view, llm_rows={(1, SIZES): sizes}, final_norm=norm)
    found = kept(view, vtc.create("dart", pivots=pivots).select(view))
    for item, numbers in enumerate(found):
        row, count = view.items.rows[item], view.items.counts[item]
        text = view.text[row]
        expected = plain_choice(
            norm(view.tokens[item, :count]),
            sizes[row, view.items.index[item, :count]].tolist(),
            norm(view.hidden[row, text]),
            sizes[row, text].tolist(),
            view.keep_from_layer(2)[item],
            pivots,
        )
        assert numbers == expected


@pytest.mark.parametrize("keep", [1, 3, 5, 17, 63, 1000])
def test_the_plain_choice_on_input_embeddings(make_view: Any, kept: Any, keep: int) -> None:
    """Sizes are L1 norms of the embeddings, which are compared as they are."""
    view = make_view(SHAPES, keep=keep)
    view = dataclasses.replace(view, final_norm=norm)
    found = kept(view, vtc.create("dart", layer=0).select(view))
    for item, numbers in enumerate(found):
        row, count = view.items.rows[item], view.items.counts[item]
        tokens, text = view.tokens[item, :count], view.hidden[row, view.text[row]]
        sizes = [x.abs().sum(1).tolist() for x in (tokens, text)]
        assert numbers == plain_choice(tokens, sizes[0], text, sizes[1], view.keep[item])
        assert len(numbers) == min(keep, count)


def test_without_text_the_visual_pivots_choose_alone(make_view: Any, kept: Any) -> None:
    view = make_view([(7, 9), (5, 5)], keep=11)
    view = dataclasses.replace(view, text=torch.zeros_like(view.text))
    for item, numbers in enumerate(kept(view, vtc.create("dart", layer=0).select(view))):
        tokens = view.tokens[item, : view.items.counts[item]]
        assert numbers == plain_choice(tokens, tokens.abs().sum(1).tolist(), tokens[:0], [], 11)


def test_equal_cosines_go_to_the_lower_index() -> None:
    same, every = torch.zeros(1, 2, 9), torch.ones(1, 9, dtype=torch.bool)
    first = torch.zeros(1, 9, dtype=torch.bool).index_fill(1, torch.tensor([5]), True)
    found = least_alike(same, torch.ones(1, 2, dtype=torch.bool), first, torch.tensor([6]), every)
    assert found[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_key_sizes_are_those_of_all_rotations() -> None:
    """The mean L1 norm over many angles, up to a factor; turning the keys changes nothing."""
    key = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    read = lambda key: SIZES.read(AttentionCall(key, key, None, 1.0, True), None)  # type: ignore[arg-type]  # noqa: E731
    a, b = key.double().unflatten(3, (2, 4)).unbind(3)
    total = torch.zeros(2, 5, dtype=torch.double)
    for step in range(1000):
        angle = torch.tensor(2 * math.pi * (step + 0.5) / 1000, dtype=torch.double)
        turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 3)
        total += turned.abs().sum((1, 3)) / 1000
        if step == 300:
            assert torch.allclose(read(turned), read(key), atol=1e-5)
    assert torch.allclose(read(key).double(), total * math.pi / 4, rtol=1e-4)


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("dart")) == {"layer": 2, "pivots": (4, 4), "schedule": None}
    plan = vtc.create("dart", layer=3).plan(LLAMA)
    assert (plan.stages, plan.needs, plan.positions) == ((3,), vtc.Needs(llm={2: SIZES}), "preserve")
    plan = vtc.create("dart", layer=0).plan(LLAMA)
    assert (plan.stages, plan.needs, plan.positions) == ((0,), vtc.Needs(), "preserve")
    with pytest.raises(VTCError, match=r"layer=-1 is no LLM layer; pass 0 for the LLM's input or 2"):
        vtc.create("dart", layer=-1)
    for pivots in ((0, 4), (4, -1)):
        with pytest.raises(VTCError, match=r"at least one visual pivot .* the paper uses \(4, 4\)"):
            vtc.create("dart", pivots=pivots)
    with pytest.raises(BudgetError, match="cannot be met by 'dart'"):
        vtc.compress(tiny_model("llava-clip"), "dart", retention=0.4)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_the_kept_set_is_that_of_the_models_own_states(layer: int) -> None:
    model = tiny_model("llava-clip")
    llm = adapters.of(model).language_model
    with torch.no_grad():
        llm.norm.weight.copy_(torch.linspace(0.1, 4, len(llm.norm.weight)))
    inputs = tiny_inputs("llava-clip", [["image", 9]], seed=layer, model=model)
    keys: list[Tensor] = []
    hook = llm.layers[layer - 1].self_attn.k_proj.register_forward_hook(lambda m, a, output: keys.append(output[0]))
    rows = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
    hook.remove()
    with vtc.compress(model, "dart", layer=layer, retention=0.85) as handle:
        model(**inputs)
    key = keys[0].unflatten(1, (-1, 2, llm.layers[0].self_attn.head_dim // 2))
    sizes, y = key.norm(dim=2).sum((1, 2)), llm.norm(rows)
    item = handle.trace[0].items[0]
    at = item.positions.tolist()
    words = [j for j in range(len(rows)) if j not in at]
    kept = item.kept[layer].tolist()
    assert kept == plain_choice(y[at], sizes[at].tolist(), y[words], sizes[words].tolist(), len(kept))
    assert len(kept) == handle.budget.tokens_from_layer(16, layer, 4)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_budget_is_met_on_every_model(name: str, layer: int) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        with torch.no_grad(), vtc.compress(model, "dart", layer=layer, retention=0.6) as handle:
            model(**inputs)
        items = handle.trace[0].items
        wanted = sum(vtc.tokens_to_keep(len(item.positions), 0.6) for item in items)
        assert abs(sum(handle.stats.calls[0].visual_tokens_kept) - wanted) <= 0.5 * len(items)
