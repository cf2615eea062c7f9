"""The yardstick itself: the oracle masks exactly what it is told, tiny models and inputs are what they say."""

from __future__ import annotations

import math
import os
import socket
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc import adapters
from vtc.engine.taps import TapSet
from vtc.errors import VTCError
from vtc.testing import TINY_MODELS, Deviation, FixedKeep, Oracle, snapshot, tiny_inputs, tiny_model
from vtc.testing.contract import generate
from vtc.testing.overhead import _first

NAME = "llava-clip"
PAIR = [[3, "image", 5], [2, "image", 9]]


def tables(inputs: dict[str, Tensor], layers: tuple[int, ...], image: int = 120) -> dict[int, Tensor]:
    """Every other visual token goes at the first layer, half of the rest at the next."""
    visual = inputs["input_ids"] == image
    number = visual.cumsum(1)
    keep, found = inputs["attention_mask"].bool(), {}
    for step, layer in enumerate(layers):
        keep = keep & (~visual | (number % 2 ** (step + 1) == 0))
        found[layer] = keep
    return found


def last(model: Any, manager: Any, inputs: dict[str, Tensor]) -> Tensor:
    with manager, torch.no_grad():
        return model(**inputs).logits[:, -1]  # type: ignore[no-any-return]


# --- the oracle
@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_oracle_that_drops_nothing_is_the_model(name: str, limits: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, PAIR, extra=1, model=model)
    everything = {0: inputs["attention_mask"].bool(), 2: inputs["attention_mask"].bool()}
    plain_ids, plain = generate(model, inputs, nullcontext(), 4)
    ids, logits = generate(model, inputs, Oracle(model, everything), 4)
    assert torch.equal(ids, plain_ids)
    assert float((logits - plain).abs().max()) <= limits.logits


@pytest.mark.parametrize("layers", [(0,), (0, 2), (2,)])
def test_dropping_matters(clip: Any, limits: Any, layers: tuple[int, ...]) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    plain, pruned = last(clip, nullcontext(), inputs), last(clip, Oracle(clip, tables(inputs, layers)), inputs)
    assert float((plain - pruned).abs().max()) > 10 * limits.broken


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_what_is_dropped_has_no_influence_from_there_on(clip: Any, layer: int) -> None:
    """Noise on the dropped rows that enter the layer changes no bit; on the kept ones it changes much."""
    inputs = tiny_inputs(NAME, PAIR, extra=1)
    keep = tables(inputs, (layer,))[layer]
    results = []
    for noisy in (None, ~keep, keep):

        def disturb(module: Any, args: Any, kwargs: dict[str, Any], noisy: Any = noisy) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            changed = hidden if noisy is None else hidden + noise * noisy[..., None]
            return (changed, *args[1:]), kwargs

        hook = clip.model.language_model.layers[layer].register_forward_pre_hook(disturb, with_kwargs=True)
        results.append(last(clip, Oracle(clip, {layer: keep}), inputs))
        hook.remove()
    assert torch.equal(results[0], results[1])
    assert float((results[0] - results[2]).abs().max()) > 0.1


def test_compact_positions_are_those_of_the_short_prompt(clip: Any, limits: Any) -> None:
    """Dropping before the LLM and renumbering is nothing but a shorter prompt."""
    inputs = tiny_inputs(NAME, PAIR[:1])
    keep = tables(inputs, (0,))[0]
    with torch.no_grad():
        features = torch.cat(list(clip.model.get_image_features(inputs["pixel_values"]).pooler_output))
        rows = clip.get_input_embeddings()(inputs["input_ids"])
        rows[inputs["input_ids"] == 120] = features
        short = clip(inputs_embeds=rows[:, keep[0]]).logits[:, -1]
    found = last(clip, Oracle(clip, {0: keep}, positions="compact"), inputs)
    assert float((found - short).abs().max()) <= limits.logits
    assert float((last(clip, Oracle(clip, {0: keep}), inputs) - short).abs().max()) > limits.broken


@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_the_oracle_under_eager_attention(clip: Any, limits: Any, positions: Any) -> None:
    eager, inputs = tiny_model(NAME, attn_implementation="eager"), tiny_inputs(NAME, PAIR, extra=1)
    dropped = tables(inputs, (0, 2))
    logits = [generate(m, inputs, Oracle(m, dropped, positions=positions), 4)[1] for m in (clip, eager)]
    assert float((logits[0] - logits[1]).abs().max()) <= limits.logits


def test_the_oracle_leaves_nothing_behind(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    last(clip, nullcontext(), inputs)
    before = snapshot(clip)
    last(clip, Oracle(clip, tables(inputs, (0, 2))), inputs)
    assert snapshot(clip) == before


def test_deviations_that_are_no_number_do_not_pass() -> None:
    assert Deviation("m", "n", "c", 0.0, 0.0).passed
    assert not Deviation("m", "n", "c", 2e-5, 1e-5).passed
    assert not Deviation("m", "n", "c", math.nan, 1.0).passed
    assert not Deviation("m", "n", "c", math.inf, 1.0).passed


# --- tiny models and inputs
@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models_are_reproducible(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = tiny_model(name), tiny_model(name), tiny_model(name, seed=1)
    assert torch.equal(torch.rand(1), expected)  # building one draws nothing from the global generator
    pairs = zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True)
    different = 0
    for (key, one), two, three in pairs:
        assert torch.equal(one, two), key
        assert one.dtype == torch.float32
        different += not torch.equal(one, three)
    assert different > 10
    assert not first.training
    assert adapters.of(first).spec.llm_layers == 4
    assert adapters.of(tiny_model(name, layers=6)).spec.llm_layers == 6


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_inputs_pad_where_they_are_told(name: str) -> None:
    model = tiny_model(name)
    kind = TINY_MODELS[name].kinds[0]
    layout = [[4, kind, 3, kind, 5], [2, kind, 12], [9]]
    left = tiny_inputs(name, layout, seed=3, model=model)
    right = tiny_inputs(name, layout, seed=3, padding="right", extra=2, model=model)
    for row in range(3):
        one, other = left["attention_mask"][row].bool(), right["attention_mask"][row].bool()
        count = int(one.sum())
        assert bool(one[len(one) - count :].all())
        assert bool(other[:count].all())
        assert torch.equal(left["input_ids"][row, one], right["input_ids"][row, other])
        alone = tiny_inputs(name, layout, seed=3, only=row, model=model)
        assert torch.equal(alone["input_ids"][0], left["input_ids"][row, one])
        assert bool(alone["attention_mask"].all())
    assert right["input_ids"].shape[1] == left["input_ids"].shape[1] + 2
    again = tiny_inputs(name, layout, seed=3, model=model)
    assert left.keys() == again.keys()
    assert all(torch.equal(left[key], again[key]) for key in left)
    assert not torch.equal(tiny_inputs(name, layout, seed=4, model=model)["input_ids"], left["input_ids"])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_probe_keeps_its_share_whatever_the_batch(name: str) -> None:
    model = tiny_model(name)
    layout = [[3, TINY_MODELS[name].kinds[0], 5], [2, TINY_MODELS[name].kinds[0], 9]]
    with vtc.compress(model, FixedKeep(rate=0.25)) as handle, torch.no_grad():
        model(**tiny_inputs(name, layout, model=model))
    for item in handle.trace[0].items:
        assert 0 < len(item.kept[0]) < len(item.positions)


# --- snapshots
def residue(model: Any, kind: str) -> Any:
    """Leave something behind; returns what takes it away again."""
    layer = model.model.language_model.layers[1]
    if kind == "pre-hook":
        return layer.register_forward_pre_hook(lambda module, args: None).remove
    if kind == "hook":
        return layer.register_forward_hook(lambda module, args, output: None, always_call=True).remove
    if kind == "attribute":
        model.model.get_image_features = model.model.get_image_features
        return lambda: delattr(model.model, "get_image_features")
    if kind == "submodule":
        layer.extra = torch.nn.Identity()
        return lambda: delattr(layer, "extra")
    if kind == "weight":
        weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj.weight = torch.nn.Parameter(weight.detach().clone())
        return lambda: setattr(layer.mlp.up_proj, "weight", weight)
    if kind == "attention function":
        own = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda *args, **kwargs: own(*args, **kwargs)
        return lambda: ALL_ATTENTION_FUNCTIONS.__delitem__("sdpa")
    taps = TapSet([(layer.self_attn, lambda call: None)])
    taps.install()
    return taps.remove


@pytest.mark.parametrize("kind", ["pre-hook", "hook", "attribute", "submodule", "weight", "attention function", "tap"])
def test_snapshots_see_every_kind_of_residue(clip: Any, kind: str) -> None:
    before = snapshot(clip)
    assert snapshot(clip) == before
    undo = residue(clip, kind)
    assert snapshot(clip) != before
    undo()
    assert snapshot(clip) == before


# --- the suite
def test_no_test_reaches_the_network() -> None:
    with socket.socket() as opened, pytest.raises(pytest.fail.Exception, match="network use"):
        opened.connect(("192.0.2.1", 80))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert torch.get_num_threads() == 1


# --- the cost of a compressed prefill
@torch.no_grad()
def test_methods_without_a_budget_are_measured_where_they_drop_something(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    retention, kept, rows = _first(clip, "withdraw", inputs)
    assert retention is None and 0 < kept < 16 and rows[0] > rows[-1]
    with pytest.raises(VTCError, match="drops nothing here"):
        _first(clip, "visual_window", inputs)
