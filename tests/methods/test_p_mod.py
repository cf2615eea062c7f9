"""p-MoD: its routers and gains against the equations, with layers called block by block, and what training reaches."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.eval.training import p_mod_report
from vtc.eval.training.settings import TrainingSettings
from vtc.method.base import ModelSpec, StageView
from vtc.methods.p_mod import PMoD
from vtc.testing import check_method, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, identical

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, width=6)
VISUAL, FIRST = 16, 4  # of the prompt below: tokens, and place of the first one
SHARES = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """Makes p_mod with seeded routers that are no zeros, for a model, from a file."""

    def make(name: str, std: float = 0.1, **options: Any) -> PMoD:
        method, spec = PMoD(training=True, **options), adapters.of(tiny_model(name)).spec
        module, draws = method.module(spec), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_(std=std, generator=draws)
        path = method.save(tmp_path / f"{name}.safetensors", module, spec)
        return dataclasses.replace(method, training=False, weights=str(path))

    return make


def weight_of(router: Any, row: Tensor) -> float:
    """w = 0.2 tanh(router(h)) + 1, in float64."""
    logit = sum(a * b for a, b in zip(router.weight[0].double().tolist(), row.double().tolist(), strict=True))
    return 0.2 * math.tanh(logit + router.bias.item()) + 1


# --- one stage
@pytest.mark.parametrize("retention", [0.3, 0.6])
def test_kept_sets_and_gains(make_view: Any, kept: Any, retention: float) -> None:
    """Items of odd sizes side by side, with newlines; one whose tokens all go through is left as it is."""
    method = PMoD(training=True)
    module: Any = method.build(LLAMA)
    assert set(module.state_dict()) == {f"layer{at}.{part}" for at in range(1, 32) for part in ("weight", "bias")}
    assert not any(weight.any() for weight in module.parameters())
    torch.manual_seed(3)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    view = make_view([(7, 9), (5, 5), (1, 1), (2, 3)], spec=LLAMA, stage=10, retention=retention)
    view = dataclasses.replace(view, module=module)
    selection = method.select(view)
    assert selection is not None and selection.gains is not None
    found = kept(view, selection)
    for item, count in enumerate(view.items.counts):
        weights = [weight_of(module["layer10"], row) for row in view.tokens[item, :count]]
        through = method.through(view, 10)[item]
        best = sorted(sorted(range(count), key=lambda j: (-weights[j], j))[:through])
        assert found[item] == best
        expected = weights if through < count else [1.0] * count
        assert selection.gains[item, :count].tolist() == pytest.approx(expected, abs=5e-6)
    assert method.through(view, 10)[2] == 1 == view.items.counts[2]


def test_zero_routers_tie(make_view: Any, kept: Any) -> None:
    method = PMoD(training=True)
    view = dataclasses.replace(make_view([(4, 4)], spec=LLAMA, stage=31, retention=0.5), module=method.build(LLAMA))
    selection = method.select(view)
    assert selection is not None and selection.gains is not None
    assert kept(view, selection) == [list(range(method.through(view, 31)[0]))]
    assert bool((selection.gains == 1).all())


# --- a model block by block
def routed(model: Any, inputs: dict[str, Tensor], routers: Any) -> tuple[Tensor, dict[int, list[int]]]:
    """Logits of one prompt by the equations, attention and MLP of each layer called by hand; and who goes through."""
    llm = model.model.language_model
    seen: list[Tensor] = []
    hook = llm.layers[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model(**inputs)
    hook.remove()
    hidden, kept = seen[0], {}
    every = range(hidden.shape[1])
    visual = range(FIRST, FIRST + VISUAL)
    for number, layer in enumerate(llm.layers):
        count = math.floor(VISUAL * SHARES[number] + 0.5)
        w = {j: weight_of(routers[f"layer{number}"], hidden[0, j]) if count < VISUAL else 1.0 for j in visual}
        best = sorted(sorted(visual, key=lambda j: (-w[j], j))[:count])
        kept[number] = [j - FIRST for j in best]
        places = torch.tensor([j for j in every if j not in visual or j in best])
        rows, length = hidden[:, places], len(places)
        mask = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        attended, _ = layer.self_attn(
            layer.input_layernorm(rows),
            position_embeddings=llm.rotary_emb(rows, places[None]),
            attention_mask=mask[None, None],
        )
        u = rows + attended
        m = layer.mlp(layer.post_attention_layernorm(u))
        after = torch.stack([hidden[0, j] * w.get(j, 1.0) for j in every])
        for at, j in enumerate(places.tolist()):
            after[j] = u[0, at] + w.get(j, 1.0) * m[0, at]
        hidden = after[None]
    return model.lm_head(llm.norm(hidden)), kept


@torch.no_grad()
def test_logits_are_those_of_blocks_called_by_hand(trained: Any) -> None:
    method = trained("llava-clip", schedule=SHARES)
    inputs = tiny_inputs("llava-clip", [[4, "image", 5]], seed=3)
    model = tiny_model("llava-clip")
    with vtc.compress(model, method) as handle:
        output, routers = model(**inputs, use_cache=True), handle.module
    expected, kept = routed(tiny_model("llava-clip", attn_implementation="eager"), inputs, routers)
    (item,) = handle.trace[0].items
    assert {0: list(range(VISUAL)), **{stage: each.tolist() for stage, each in item.kept.items()}} == kept
    assert any(numbers != sorted(numbers)[: len(numbers)] or numbers[-1] >= len(numbers) for numbers in kept.values())
    assert float((output.logits - expected).abs().max()) < LIMIT
    rows = [25 - VISUAL + len(kept[layer]) for layer in range(4)]
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == rows
    plain = PMoD(schedule=SHARES, training=True)
    with vtc.compress(model, plain) as handle:  # the gains are seen in the logits
        assert float((model(**inputs).logits - expected).abs().max()) > 100 * LIMIT


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl-moe"])
def test_the_contract_with_routers_that_are_no_zeros(trained: Any, name: str) -> None:
    check_method(
        trained(name), models=[name], steps=2, retention=0.7, policies=["preserve"], generation=("greedy", "beam 3")
    )


@torch.no_grad()
def test_a_budget_of_everything_changes_no_bit(trained: Any) -> None:
    model, method = tiny_model("llava-clip"), trained("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 5], [9]], model=model)
    assert identical(model, inputs, lambda model: vtc.compress(model, method, retention=1.0)) == 0
    assert identical(model, inputs, lambda model: vtc.compress(model, method, retention=0.5)) > 0


@torch.no_grad()
def test_a_whole_item_beside_a_shorter_one_is_as_alone(trained: Any) -> None:
    """Budgets of their own: the one that is granted everything has no gains."""
    model, method = tiny_model("llava-clip"), trained("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 5], [4, "image", 5]], model=model)
    expected = model(**inputs).logits
    with vtc.compress(model, method, retention=[1.0, 0.4]):
        found = model(**inputs).logits
    assert float((found[0] - expected[0]).abs().max()) < LIMIT < float((found[1] - expected[1]).abs().max())


# --- training
def test_gradients_are_those_of_differences() -> None:
    """Through the rows that go through a layer and through those that go around it."""
    model, method = tiny_model("llava-clip").requires_grad_(False), PMoD(schedule=SHARES, training=True)
    inputs, step, seen = tiny_inputs("llava-clip", [[4, "image", 5]], seed=3), 2e-2, []
    model.model.language_model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def length() -> Tensor:
        model(**inputs, use_cache=False)
        return seen[-1].double().square().sum()

    with vtc.compress(model, method, pad_output=True) as handle:
        routers: Any = handle.module
        torch.manual_seed(1)
        for weight in routers.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        model(**inputs, use_cache=False).logits[:, -1].square().sum().backward()
        answering = [float(routers[f"layer{layer}"].weight.grad.abs().max()) for layer in (1, 2, 3)]
        assert answering[0] > 0.1 and answering[1] > 0 == answering[2]  # nothing reads the visual rows of the end
        for number in (1, 2, 3):
            bias = routers[f"layer{number}"].bias
            bias.grad = None
            length().backward()
            sides = []
            with torch.no_grad():  # the scores of all tokens move alike, so that the same ones go through
                for shift in (step, -2 * step):
                    bias += shift
                    sides.append(float(length()))
                bias += step
            assert abs(float(bias.grad)) > 10
            assert float(bias.grad) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=0.01)


# --- the embedded weights
def test_training_pays_on_scenes_never_seen() -> None:
    """The lines of the page; of 360 questions at this retention trained routers answer 29 points more than zeros."""
    found = p_mod_report.lines((0.4,), 6)
    assert [name for name, _, _ in found[1:]] == [
        "p_mod, p_mod-tiny-llava", "p_mod, zero routers", "ranked_routing", "random",
    ]  # fmt: skip
    right = [sum(result.right) for _, _, result in found]
    assert right[0] == 54 >= right[1] >= right[2] + 8
    assert all(abs(result.retention - 0.4) < 0.01 for _, _, result in found[1:])
    text = p_mod_report.report(found)
    assert text.count("| p_mod, ") == 2 and "vtc train --method p_mod --out runs/p_mod --batch-size 12" in text


# --- plans and refusals
def test_plans_and_refusals(trained: Any, make_view: Any) -> None:
    method = vtc.create("p_mod")
    plan = method.plan(LLAMA)
    assert plan.stages == plan.skips == tuple(range(1, 32)) and plan.positions == "preserve"
    assert plan.gains and not plan.needs.llm and method.least_retention(LLAMA) == 1 / 32
    model = tiny_model("llava-clip")
    with pytest.raises(VTCError, match=r"'p_mod' runs on learned weights and none were given; .* --method p_mod"):
        vtc.compress(model, "p_mod", retention=0.5)
    some = trained("llava-clip", layers=(1, 3))
    assert vtc.learned.load(some.weights) == some
    with pytest.raises(VTCError, match="were made with routed='1,3', this run has routed='1,2,3'"):
        vtc.compress(model, dataclasses.replace(some, layers=None), retention=0.5)
    with pytest.raises(VTCError, match=r"'layer1\.weight' of shape \(1, 64\), \(1, 32\) is needed"):
        some.module(dataclasses.replace(adapters.of(model).spec, width=32))
    with pytest.raises(UnsupportedMethod, match="has one layer, which sees every token"):
        method.plan(dataclasses.replace(LLAMA, llm_layers=1))
    with pytest.raises(VTCError, match="leave out layers beside it"):
        vtc.create("p_mod", layers=(2, 3), schedule="cosine")
    with pytest.raises(BudgetError, match=r"retention=0\.2 cannot be met"):
        vtc.compress(model, trained("llava-clip"), retention=0.2)
    assert isinstance(TrainingSettings("p_mod", retention=0.5).compressor(), PMoD)
    view: StageView = make_view([(4, 4)], spec=LLAMA, stage=5, retention=1.0)
    assert PMoD(training=True).select(view) is None
