"""`share_encoder`: one encoding per batch, the same answers as without it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import vtc
from vtc.adapters.compat import EXPANDS_IN_ORDER
from vtc.compressor import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.errors import UnsupportedCall
from vtc.ops.select import top_k
from vtc.readings import VisionReading
from vtc.testing import FixedKeep, snapshot, tiny_inputs
from vtc.testing.contract import generate

NAME = "llava-clip"
LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]
METHODS = [vtc.create("vtc_cls"), vtc.create("vtc_cls", layers=1), vtc.create("pool"), vtc.create("random", seed=1)]
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "returns": {"num_beams": 2}}
MODES["returns"]["num_return_sequences"] = 2


class ByClass(Compressor):
    """A probe with settable needs."""

    name = "by_class"
    needs_budget = False

    def __init__(self, rows: VisionReading, layer: int = 1) -> None:
        object.__setattr__(self, "needs", Needs({layer: rows}))
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "read", [])

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((0,), self.needs, "preserve")  # type: ignore[attr-defined]

    def select(self, view: StageView) -> Selection | None:
        self.read.append(view.vision_attention(self.layer))  # type: ignore[attr-defined]
        return None


class InsideEncoder(Compressor):
    """Halves the patches before encoder layer 1."""

    name = "inside_encoder"
    needs_budget = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((EncoderStage(1),), Needs(), "preserve")

    def select(self, view: StageView) -> Selection | None:
        counts = [8] * len(view.items)
        return Selection(top_k(-view.items.token.float(), torch.tensor(counts)), counts=counts)


def counting(model: Any) -> list[int]:
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(1))
    return calls


def answers(model: Any, inputs: dict[str, Any], mode: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of the untouched model, of every method, and of the untouched model again."""
    attached = [lambda method=method: vtc.compress(model, method, retention=0.5) for method in METHODS]
    return [generate(model, inputs, manager(), 3, **mode)[1] for manager in (nullcontext, *attached, nullcontext)]


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_the_same_from_one_encoding(clip: Any, mode: str) -> None:
    # Before transformers 5.20 generate() hands several images of one prompt to the wrong beams.
    layout = LAYOUT if mode == "greedy" else [[6, "image", 5], *LAYOUT[1:]]
    batches = [tiny_inputs(NAME, layout, seed=seed, extra=1) for seed in range(2)]
    apart = [answers(clip, inputs, MODES[mode]) for inputs in batches]
    calls = counting(clip)
    with vtc.share_encoder(clip, METHODS) as shared:
        for inputs, expected in zip(batches, apart, strict=True):
            together = answers(clip, inputs, MODES[mode])
            assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))
            shared.clear()
    once = mode == "greedy" or EXPANDS_IN_ORDER  # older versions copy the pixels for every beam before they encode
    assert len(calls) == len(batches) * (1 if once else len(METHODS) + 2)


def test_forward_calls_share_too(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    with torch.no_grad():
        plain = clip(**inputs).logits
        calls = counting(clip)
        with vtc.share_encoder(clip):
            assert torch.equal(clip(**inputs).logits, plain)
            with vtc.compress(clip, FixedKeep()) as handle:
                clip(**inputs)
            assert torch.equal(clip(**inputs).logits, plain)
    assert len(calls) == 1
    assert handle.stats.retention == 0.5


def test_other_pixels_are_encoded_anew(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    calls = counting(clip)
    with vtc.share_encoder(clip) as shared, torch.no_grad():
        first = clip(**inputs).logits
        inputs["pixel_values"].mul_(-1)  # the same tensor with other contents
        assert not torch.equal(clip(**inputs).logits, first)
        clip(**{**inputs, "pixel_values": inputs["pixel_values"].clone()})
        assert len(calls) == 3
        shared.clear()
        clip(**inputs)
    assert len(calls) == 4
    with torch.no_grad():
        clip(**inputs)
    assert len(calls) == 5


def test_other_features_of_the_same_pixels_are_encoded_anew(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    with torch.no_grad():
        early = clip(**inputs, vision_feature_layer=-3).logits
        late = clip(**inputs).logits
        with vtc.share_encoder(clip):
            assert torch.equal(clip(**inputs).logits, late)
            assert torch.equal(clip(**inputs, vision_feature_layer=-3).logits, early)
            assert torch.equal(clip(**inputs).logits, late)


def test_nothing_is_left_behind(clip: Any) -> None:
    with torch.no_grad():
        clip(**tiny_inputs(NAME, LAYOUT))
        before = snapshot(clip)
        with vtc.share_encoder(clip, METHODS):
            assert snapshot(clip) != before
            clip(**tiny_inputs(NAME, LAYOUT))
        assert snapshot(clip) == before
        with pytest.raises(ZeroDivisionError), vtc.share_encoder(clip, METHODS):
            raise ZeroDivisionError
    assert snapshot(clip) == before


@pytest.mark.parametrize("first", ["shared", "method"])
def test_blocks_may_end_in_any_order(clip: Any, first: str) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    with torch.no_grad():
        plain = clip(**inputs).logits
        before = snapshot(clip)
        shared = vtc.share_encoder(clip, METHODS)
        shared.__enter__()
        handle = vtc.compress(clip, "vtc_cls", retention=0.5)
        pruned = clip(**inputs).logits[:, -1]
        if first == "shared":
            shared.__exit__(None, None, None)
            assert torch.equal(clip(**inputs).logits[:, -1], pruned)
            handle.detach()
        else:
            handle.detach()
            shared.__exit__(None, None, None)
        assert snapshot(clip) == before
        assert torch.equal(clip(**inputs).logits, plain)
        again = vtc.compress(clip, "vtc_cls", retention=0.5)
        with again:
            assert torch.equal(clip(**inputs).logits[:, -1], pruned)
    assert snapshot(clip) == before


def test_every_method_has_to_be_named(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    with vtc.share_encoder(clip, [vtc.create("vtc_cls", layers=1)]), torch.no_grad():
        with vtc.compress(clip, "vtc_cls", layers=1, retention=0.5):
            clip(**inputs)
        with (
            vtc.compress(clip, "vtc_cls", layers=3, retention=0.5),
            pytest.raises(UnsupportedCall, match=r"attention of vision layers \[0, 1\]; name every method"),
        ):
            clip(**inputs)


def test_methods_may_read_one_layer_in_different_ways(clip: Any) -> None:
    """Every reading is recorded; each method gets its own."""
    inputs = tiny_inputs(NAME, LAYOUT)
    methods = [ByClass(Rows.CLS, 1), ByClass(Rows.RECEIVED, 1), ByClass(Rows.RECEIVED, 2)]

    def read() -> list[torch.Tensor]:
        for method in methods:
            generate(clip, inputs, vtc.compress(clip, method), 1)
        return [method.read.pop() for method in methods]  # type: ignore[attr-defined]

    alone = read()
    calls = counting(clip)
    with vtc.share_encoder(clip, methods):
        together = read()
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(together[0], together[1])


def test_methods_inside_the_encoder_encode_for_themselves(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    alone = generate(clip, inputs, vtc.compress(clip, InsideEncoder()), 3)[1]
    plain = generate(clip, inputs, nullcontext(), 3)[1]
    calls = counting(clip)
    with vtc.share_encoder(clip, [InsideEncoder(), METHODS[0]]):
        assert torch.equal(generate(clip, inputs, nullcontext(), 3)[1], plain)
        assert torch.equal(generate(clip, inputs, vtc.compress(clip, InsideEncoder()), 3)[1], alone)
        assert torch.equal(generate(clip, inputs, nullcontext(), 3)[1], plain)
    assert len(calls) == 2
