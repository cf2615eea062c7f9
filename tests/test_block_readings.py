"""Readings of the blocks of LLM layers equal what hooks placed by hand see, and the model does not notice them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import UnsupportedModel
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.readings import BlockReading, LLMReading, QueryRows
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@dataclass(frozen=True)
class Changes(BlockReading):
    """The first number of what goes in and of what comes out."""

    name: ClassVar[str] = "changes"

    def changed(self, before: Tensor, after: Tensor, rows: QueryRows) -> Tensor:
        return torch.stack([before[..., 0], after[..., 0]]).float()


@dataclass(frozen=True)
class Looks(Compressor):
    """Drops every other token before layer 1, and before layer 3 looks at a reading of some layers."""

    reading: LLMReading = field(default_factory=Changes)
    at: tuple[int, ...] = (0, 2)
    drops: bool = True
    seen: list[Any] = field(default_factory=list, compare=False)

    needs_budget: ClassVar[bool] = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((1, 3), Needs(llm=dict.fromkeys(self.at, self.reading)), "preserve")

    def select(self, view: StageView) -> Selection | None:
        if view.stage == 1:
            return Selection(view.items.token % 2 == 0) if self.drops else None
        found = {layer: view.llm_attention(layer, self.reading) for layer in self.at}
        self.seen.append((view, found))
        return None


@dataclass(frozen=True)
class Weighs(Compressor):
    """Every other token skips layer 1; before layer 2 looks at what the blocks of layer 1 made."""

    gains: bool = True
    seen: list[Any] = field(default_factory=list, compare=False)

    needs_budget: ClassVar[bool] = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((1, 2), Needs(llm={1: Changes()}), "preserve", skips=(1,), gains=self.gains)

    def select(self, view: StageView) -> Selection | None:
        if view.stage == 2:
            self.seen.append(view.llm_attention(1, Changes()))
            return None
        gains = 0.5 + view.items.token / 16 if self.gains else None
        return Selection(view.items.token % 2 == 0, gains=gains)


def by_hand(model: Any, layers: tuple[int, ...]) -> tuple[dict[tuple[int, str], list[Tensor]], list[Any]]:
    """Hooks that note [before, after] of the blocks of some layers, and their handles."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for number in layers:
        layer = adapters.of(model).layers[number]
        for name in ("self_attn", "mlp"):

            def note(module: Any, args: Any, kwargs: Any, output: Any, key: Any = (number, name)) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                seen[key] = [before, output[0] if isinstance(output, tuple) else output]

            handles.append(getattr(layer, name).register_forward_hook(note, with_kwargs=True))
    return seen, handles


@pytest.mark.parametrize("name", TINY_MODELS)
@torch.no_grad()
def test_what_goes_in_and_out(name: str) -> None:
    """Of layer 0 where all rows are there, of layer 2 where half of the visual ones are."""
    model, method = tiny_model(name), Looks()
    inputs = tiny_inputs(name, LAYOUT, seed=2, model=model)
    expected = model(**inputs).logits
    blocks = [*adapters.of(model).llm_attention, *adapters.of(model).llm_mlp]
    hooks = [len(block._forward_hooks) for block in blocks]
    with vtc.compress(model, method) as handle:
        seen, handles = by_hand(model, (0, 2))
        model(**inputs)
        for each in handles:
            each.remove()
    ((view, found),) = method.seen
    for item, row in enumerate(view.items.rows):
        token = view.items.token[item][view.items.mask[item]]
        assert token.numel() and torch.equal(token, token // 2 * 2)
        place = handle.trace[0].items[item].positions[token]
        for block, part in enumerate(("self_attn", "mlp")):
            for side in range(2):
                whole = seen[0, part][side][row, place, 0].float()
                assert torch.equal(found[0][block, side, item][view.items.mask[item]], whole)
                short = seen[2, part][side][row, view.items.index[item], 0].float()
                assert torch.equal(found[2][block, side, item][view.items.mask[item]], short[view.items.mask[item]])
    assert [len(block._forward_hooks) for block in blocks] == hooks
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
def test_a_transition_row_by_row(name: str) -> None:
    """Padding plays no part: the softmax is over each prompt's own rows."""
    model, method = tiny_model(name), Looks(Rows.TRANSITION, (1,), drops=False)
    inputs = tiny_inputs(name, LAYOUT, seed=2, model=model)
    with vtc.compress(model, method):
        seen, handles = by_hand(model, (1,))
        model(**inputs)
        for each in handles:
            each.remove()
    ((view, found),) = method.seen
    for block, part in enumerate(("self_attn", "mlp")):
        before, after = (each.double() for each in seen[1, part])
        for item, row in enumerate(view.items.rows):
            there = inputs["attention_mask"][row].bool().nonzero()[:, 0].tolist()
            turn = {i: float(1 - torch.cosine_similarity(before[row, i], after[row, i], dim=0)) for i in there}
            total = sum(torch.tensor(turn[i]).double().exp() for i in there)
            for place, value in zip(view.items.index[item].tolist(), found[1][block, item].tolist(), strict=True):
                stretch = float(after[row, place].norm() / before[row, place].norm())
                expected = stretch * float(torch.tensor(turn[place]).double().exp() / total)
                assert abs(value - expected) <= 5e-5 * expected


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
def test_the_question_ahead_equals_eager_weights(name: str, limits: Any) -> None:
    model, method = tiny_model(name), Looks(Rows.QUESTION_AHEAD, (3,), drops=False)
    inputs = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12], [3, "image"]], seed=2, model=model)
    with vtc.compress(model, method):
        model(**inputs)
    ((view, found),) = method.seen
    eager = tiny_model(name, attn_implementation="eager")
    weights: list[Tensor] = []
    adapters.of(eager).llm_attention[3].register_forward_hook(lambda module, args, output: weights.append(output[1]))
    eager(**inputs)
    for item, row in enumerate(view.items.rows):
        first = int(view.visual[row].nonzero()[0])
        asking = [i for i in range(first, view.text.shape[1]) if view.text[row, i]]
        expected = torch.zeros_like(found[3][item])
        for i in asking:
            expected += weights[0][row, :, i, view.items.index[item]].mean(0) / len(asking)
        assert asking or (row == 2 and name == "llava-clip")  # others end a picture with a token of text
        assert float((found[3][item] - expected)[view.items.mask[item]].abs().max()) <= limits.attention


@torch.no_grad()
def test_eager_attention_serves_blocks() -> None:
    found = []
    for implementation in ("sdpa", "eager"):
        method = Looks(Rows.TRANSITION)
        model = tiny_model("llava-clip", attn_implementation=implementation)
        with vtc.compress(model, method):
            model(**tiny_inputs("llava-clip", LAYOUT, seed=2, model=model))
        found.append(method.seen[0][1])
    for layer in (0, 2):
        assert torch.allclose(found[0][layer], found[1][layer], rtol=1e-4)


@torch.no_grad()
def test_a_copy_goes_without() -> None:
    model, method = tiny_model("llava-clip"), Looks()
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=2, model=model)
    with vtc.compress(model, method):
        twin = copy.deepcopy(model)
        twin(**inputs)
    assert not method.seen


@torch.no_grad()
def test_readings_see_an_mlp_before_gains_do() -> None:
    """A layer that tokens skip, with gains and a reading: what is read is what the block made."""
    model, seen = tiny_model("llava-clip"), []
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=2, model=model)
    for gains in (False, True):
        method = Weighs(gains=gains)
        with vtc.compress(model, method):
            logits = model(**inputs).logits
        seen.append((method.seen[0], logits))
    assert torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_compiled_layers_weigh() -> None:
    model, method = tiny_model("llava-clip"), Weighs()
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=2, model=model)
    with vtc.compress(model, method):
        expected = model(**inputs).logits
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager", dynamic=True)
    with vtc.compress(model, method):
        found = model(**inputs).logits
    torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_compiled_layers_are_read_and_compiled_blocks_refused() -> None:
    model, method, same = tiny_model("llava-clip"), Looks(), Looks()
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=2, model=model)
    with vtc.compress(model, same):
        model(**inputs)
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager", dynamic=True)
    with vtc.compress(model, method):
        model(**inputs)
    torch._dynamo.reset()
    for layer in (0, 2):
        assert torch.allclose(method.seen[0][1][layer], same.seen[0][1][layer], atol=1e-5)
    model.model.language_model.layers[2].mlp.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match="LlamaMLP was compiled"):
        vtc.compress(model, Looks())
