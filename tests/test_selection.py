"""What a selection may do besides dropping tokens: drop separators and whole items, hide, soften, add to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc.adapters.compat import expands_in_order
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, Stage, StageView
from vtc.ops.hashing import uniform
from vtc.testing import FixedKeep, Oracle, tiny_inputs, tiny_model
from vtc.testing.contract import against_oracle, batch_against_singles, generate

LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@dataclass(frozen=True)
class Selecting(Compressor):
    """A probe whose subclasses act at the given stages."""

    at: tuple[Stage, ...] = (0,)

    name: ClassVar[str] = "selecting"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(self.at, Needs(), "preserve")

    def draw(self, view: StageView, table: Any = None) -> Tensor:
        table = view.items if table is None else table
        return uniform(view.fingerprint, table.token, self.at.index(view.stage)) < 0.5


@dataclass(frozen=True)
class Separators(Selecting):
    """Drops half the tokens and, as told, all, half or none of the separators."""

    which: str = "all"

    def select(self, view: StageView) -> Selection:
        some = self.draw(view, view.separators)
        return Selection(self.draw(view), separators={"all": False, "half": some, "none": None}[self.which])


@dataclass(frozen=True)
class Nothing(Selecting):
    """Every visual token goes, the separators too."""

    def select(self, view: StageView) -> Selection:
        return Selection(torch.zeros_like(view.items.mask), counts=(0,) * len(view.items), separators=False)


@dataclass(frozen=True)
class Hides(Selecting):
    """Half the tokens stay unseen."""

    def select(self, view: StageView) -> Selection:
        hidden = self.draw(view)
        view.memory.setdefault("hidden", []).append(hidden)
        return Selection(view.items.mask, view.items.counts, hide=hidden)


@dataclass(frozen=True)
class Softens(Selecting):
    """Weights between 0 and 1 from the module's one parameter; the loss is their sum."""

    def module(self, model: ModelSpec) -> torch.nn.Module:
        module = torch.nn.Module()
        module.bias = torch.nn.Parameter(torch.zeros(()))
        return module

    def select(self, view: StageView) -> Selection:
        assert view.module is not None
        draw = uniform(view.fingerprint, view.items.token, self.at.index(view.stage))
        weights = torch.sigmoid(4 * (draw - 0.5) + view.module.bias)
        return Selection(view.items.mask, view.items.counts, weights=weights, loss=(weights * view.items.mask).sum())


# --- separators and whole items
@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "llava-clip"])
@pytest.mark.parametrize("which", ["all", "half", "none"])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_separators_go_where_a_method_says_so(name: str, which: str, positions: Any, limits: Any) -> None:
    model = tiny_model(name)
    method = Separators((0, 2), which)
    attach = lambda m: vtc.compress(m, method, positions=positions)  # noqa: E731
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1, model=model)
    assert against_oracle(model, inputs, attach, 4) <= limits.logits
    assert batch_against_singles(model, name, LAYOUT, attach, 4) <= limits.logits
    with attach(model) as handle, torch.no_grad():
        model(**inputs)
    kept = [item.kept[0].tolist() for item in handle.trace[0].items]
    with vtc.compress(model, Separators((0,), "none"), positions=positions) as other, torch.no_grad():
        model(**inputs)
    more = [item.kept[0].tolist() for item in other.trace[0].items]
    lost = [len(b) - len(a) for a, b in zip(kept, more, strict=True)]
    assert all(set(a) <= set(b) for a, b in zip(kept, more, strict=True))
    assert any(lost) == (which != "none" and name != "llava-clip")
    assert handle.stats.calls[0].stages[0].visual_tokens_out == sum(map(len, kept))


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl", "qwen3-vl", "internvl"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_items_may_lose_everything(name: str, stage: int, positions: Any, limits: Any) -> None:
    if name == "qwen3-vl" and stage == 1:
        stage = 3  # the last deepstack rows are added behind layer 2
    model = tiny_model(name)
    attach = lambda m: vtc.compress(m, Nothing((stage,)), positions=positions)  # noqa: E731
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1, model=model)
    assert against_oracle(model, inputs, attach, 4) <= limits.logits
    with attach(model) as handle, torch.no_grad():
        model(**inputs)
    share = stage / len(vtc.adapters.of(model).layers)
    assert handle.stats.retention == pytest.approx(share)


# --- hidden tokens
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("stages", [(0,), (2,), (1, 3)])
def test_hidden_tokens_are_masked_and_stay(name: str, stages: Any, limits: Any) -> None:
    """The rows stay, in the cache too, and nobody attends to them: not in the prefill, not while decoding."""
    model, inputs = tiny_model(name), tiny_inputs(name, LAYOUT, seed=3, extra=1)
    rows = inputs["input_ids"].shape[1]
    tables: dict[int, Tensor] = {}
    visible = torch.ones(3, rows, dtype=torch.bool)
    handle = vtc.compress(model, Hides(stages))
    select = Hides.select

    def noting(self: Hides, view: StageView) -> Selection:
        selection = select(self, view)
        assert selection.hide is not None
        nonlocal visible
        visible = visible & ~view.items.scatter(selection.hide, torch.zeros(3, rows, dtype=torch.bool))
        tables[view.stage] = visible  # type: ignore[index]
        return selection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hides, "select", noting)
        _, logits = generate(model, inputs, handle, 5)
    _, expected = generate(model, inputs, Oracle(model, tables), 5)
    assert float((logits - expected).abs().max()) <= limits.logits
    call = handle.stats.calls[0]
    assert set(call.kv_rows) == {rows}
    assert handle.stats.retention == 1.0
    _, plain = generate(model, inputs, Oracle(model, {0: torch.ones_like(visible)}), 5)
    assert float((logits - plain).abs().max()) > limits.broken


# --- soft masks
def soft_reference(model: Any, inputs: dict[str, Tensor], starts: dict[int, Tensor]) -> Tensor:
    """Logits with ``P_ij = exp(l_ij) G_ij / sum_k exp(l_ik) G_ik`` in the layers from each start on, by hand."""
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    real = inputs["attention_mask"].bool()
    handles = []
    for index, layer in enumerate(vtc.adapters.of(model).layers):
        gate = torch.ones(len(real), length)
        for start, weights in starts.items():
            gate = gate * (weights if index >= start else 1)
        bias = gate.log()[:, None].expand(-1, length, -1).clone()
        bias.diagonal(dim1=1, dim2=2).zero_()
        bias = bias.masked_fill(~(causal & real[:, None]), torch.finfo(torch.float32).min)[:, None]
        hook = lambda module, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias})  # noqa: E731
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("stages", [(2,), (1, 3)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_soft_masks_weigh_the_keys(name: str, stages: Any, attention: str, limits: Any) -> None:
    model = tiny_model(name, attn_implementation=attention)
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1)
    starts: dict[int, Tensor] = {}
    select = Softens.select

    def noting(self: Softens, view: StageView) -> Selection:
        selection = select(self, view)
        assert selection.weights is not None
        starts[view.stage] = view.items.scatter(selection.weights, torch.ones(view.hidden.shape[:2]))  # type: ignore[index]
        return selection

    with pytest.MonkeyPatch.context() as patch, vtc.compress(model, Softens(stages)) as handle:
        patch.setattr(Softens, "select", noting)
        logits = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    expected = soft_reference(model, inputs, starts)
    assert float((logits - expected)[real].detach().abs().max()) <= limits.logits
    assert handle.module is not None
    assert handle.auxiliary_loss is not None
    bias = handle.module.bias
    expected_loss = sum((weights < 1).float().mul(weights).sum() for weights in starts.values())
    assert float(handle.auxiliary_loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    ours = torch.autograd.grad(logits[real].square().mean(), bias, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected[real].square().mean(), bias, retain_graph=True)[0]
    assert float(theirs.abs()) > 0
    assert float((ours - theirs).abs()) <= limits.gradient * float(theirs.abs())
    assert float(torch.autograd.grad(handle.auxiliary_loss, bias)[0]) > 0


def test_the_question_is_what_is_neither_visual_nor_answer(clip: Any) -> None:
    """Text is what is not visual, in front of the images too; labels that are not -100 mark the answer."""
    views: list[StageView] = []

    @dataclass(frozen=True)
    class Looks(Selecting):
        def select(self, view: StageView) -> None:
            views.append(view)

    inputs = tiny_inputs("llava-clip", LAYOUT, seed=3, extra=2)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 7
    with vtc.compress(clip, Looks((0,)), pad_output=True), torch.no_grad():
        clip(**inputs)
        clip(**inputs, labels=labels)
    plain, training = views
    assert plain.text.sum(1).tolist() == [12, 14, 9]
    assert training.text.sum(1).tolist() == [10, 12, 7]
    assert not (plain.text & plain.visual).any()
    assert not (plain.text & ~plain.valid).any()
    assert torch.equal(plain.text[:, :-2], training.text[:, :-2])


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl"])
def test_methods_compute_in_float32_under_autocast(name: str) -> None:
    """What is kept does not depend on the caller's autocast more than its inputs do."""
    seen: list[bool] = []

    @dataclass(frozen=True)
    class Looks(Selecting):
        def plan(self, model: ModelSpec) -> Plan:
            return Plan((2,), Needs({1: Rows.RECEIVED}, {1: Rows.LAST}), "preserve")

        def select(self, view: StageView) -> None:
            seen.append(torch.is_autocast_enabled("cpu"))
            assert view.vision_attention(1).dtype == view.llm_attention(1).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32

    model = tiny_model(name)
    with vtc.compress(model, Looks()), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**tiny_inputs(name, LAYOUT, model=model))
    assert seen == [False]


@dataclass(frozen=True)
class Sometimes(Selecting):
    """Halves the items with an even key and declines where there are none."""

    def select(self, view: StageView) -> Selection | None:
        even = view.fingerprint % 2 == 0
        if not bool(even.any()):
            return None
        return Selection(self.draw(view) | ~even[:, None])


@pytest.mark.parametrize("name", ["llava-clip", "qwen2-vl", "qwen3-vl"])
@pytest.mark.parametrize("positions", ["compact", "compact_input", "preserve"])
@pytest.mark.parametrize("at", [(0,), (0, 3)])
def test_declining_depends_on_no_neighbour(name: str, positions: Any, at: Any, limits: Any) -> None:
    """A row whose items are left alone is numbered as in a batch in which others are not."""
    model = tiny_model(name)
    rows: list[list[Any]] = [[4, "image", 3], [2, "image", 6], [3, "image", 2], [5, "image", 4]]
    attach = lambda m: vtc.compress(m, Sometimes(at), positions=positions)  # noqa: E731
    with attach(model) as handle, torch.no_grad():
        model(**tiny_inputs(name, rows, seed=3, model=model))
    kept = [len(item.kept[0]) == len(item.positions) for item in handle.trace[0].items]
    assert len(set(kept)) == 2
    assert batch_against_singles(model, name, rows, attach, 3) <= limits.logits
    assert against_oracle(model, tiny_inputs(name, rows, seed=3, model=model), attach, 3) <= limits.logits


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "llava-next"])
@pytest.mark.parametrize("at", [(0, 2), (1, 3)])
def test_positions_of_the_input_alone(name: str, at: Any, limits: Any) -> None:
    """Renumbered where the tokens enter the LLM, unchanged inside it."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1, model=model)
    attach = lambda m, p="compact_input": vtc.compress(m, FixedKeep(at=at), positions=p)  # noqa: E731
    for mode in ({}, {"num_beams": 3}):
        if expands_in_order(model) or not mode:
            assert against_oracle(model, inputs, attach, 4, **mode) <= limits.logits
    assert batch_against_singles(model, name, LAYOUT, attach, 4) <= limits.logits
    other = "compact" if at[0] == 0 else "preserve"
    _, mine = generate(model, inputs, attach(model), 3)
    _, theirs = generate(model, inputs, attach(model, other), 3)
    difference = float((mine - theirs).abs().max())
    assert difference > limits.broken if at[0] == 0 else difference <= limits.logits
