"""`share_encoder`: one encoding per batch, the same answers as without it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import vtc
from vtc import adapters
from vtc.adapters.compat import EXPANDS_IN_ORDER
from vtc.engine import taps
from vtc.engine.sharing import checksum
from vtc.errors import UnsupportedCall
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.readings import VisionReading
from vtc.ops.select import top_k
from vtc.testing import FixedKeep, snapshot, tiny_inputs, tiny_model
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


# --- what changes is noticed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_checksums_change_with_every_entry(dtype: torch.dtype) -> None:
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    before, found = int(checksum(values)), set()
    for place in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[place] = not changed.view(-1)[place] if dtype == torch.bool else changed.view(-1)[place] + 1
        found.add(int(checksum(changed)))
    assert before not in found
    assert int(checksum(values[1:, 1:])) == int(checksum(values[1:, 1:].contiguous()))
    assert int(checksum(values[1])) == int(checksum(values[1].clone()))


def shared_and_plain(model: Any, inputs: dict[str, Any], change: Any) -> tuple[bool, bool]:
    """Whether a change made after an encoding is noticed in the block, and whether it changes anything outside."""
    with vtc.share_encoder(model):
        before = model(**inputs).logits
        change()
        inside = model(**inputs).logits
    outside = model(**inputs).logits
    return torch.equal(inside, outside), not torch.equal(before, outside)


def _step(clip: Any) -> None:
    weights = list(clip.model.vision_tower.parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(weights, lr=0.1).step()


def _load(clip: Any) -> None:
    clip.model.multi_modal_projector.load_state_dict(tiny_model(NAME, seed=7).model.multi_modal_projector.state_dict())


def _merge(clip: Any) -> None:
    layer = adapters.of(clip).vision_layers[1].self_attn.q_proj
    layer.weight.data += 0.1 * torch.ones(len(layer.weight), 1) @ torch.ones(1, layer.weight.shape[1])


def _replace(clip: Any) -> None:
    tower = adapters.of(clip).vision_layers[1].self_attn
    tower.q_proj.weight = torch.nn.Parameter(tower.q_proj.weight * 2)


@pytest.mark.parametrize("change", [_step, _load, _merge, _replace])
def test_changed_weights_encode_anew(clip: Any, change: Any) -> None:
    with torch.no_grad():
        assert shared_and_plain(clip, tiny_inputs(NAME, LAYOUT), lambda: change(clip)) == (True, True)


def test_weights_of_the_language_model_do_not_count(clip: Any) -> None:
    inputs = tiny_inputs(NAME, LAYOUT)
    calls = counting(clip)
    with torch.no_grad(), vtc.share_encoder(clip):
        clip(**inputs)
        clip.lm_head.weight.mul_(2)
        adapters.of(clip).layers[0].mlp.up_proj.weight.mul_(2)
        clip(**inputs)
    assert len(calls) == 1


def test_changed_pixels_that_keep_no_count(clip: Any) -> None:
    """NumPy writes into memory that a tensor shares, and inference tensors count no writes."""
    inputs = tiny_inputs(NAME, LAYOUT)
    memory = inputs["pixel_values"].numpy()

    def write() -> None:
        memory[0, 0, 0, 0] += 50

    with torch.no_grad():
        assert shared_and_plain(clip, inputs, write) == (True, True)
    with torch.inference_mode():
        inputs["pixel_values"] = inputs["pixel_values"].clone()
        assert shared_and_plain(clip, inputs, lambda: inputs["pixel_values"].mul_(-1)) == (True, True)


def test_another_mode_encodes_anew(clip: Any) -> None:
    """Features made under no_grad or inference_mode are of no use to a training step; a graph serves one."""
    inputs = tiny_inputs(NAME, LAYOUT)
    calls = counting(clip)
    with vtc.share_encoder(clip):
        with torch.inference_mode():
            clip(**inputs)
        with torch.no_grad():
            clip(**inputs)
            clip(**inputs)
        for _ in range(2):
            clip(**inputs).logits.mean().backward()
    assert len(calls) == 4


# --- copies
COPIES: dict[str, Any] = {"deepcopy": copy.deepcopy}


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES["torch.save"] = _saved


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_inside_is_a_model_of_its_own(clip: Any, how: str) -> None:
    inputs, other = tiny_inputs(NAME, LAYOUT), tiny_model(NAME)
    hidden = ByClass(Rows.HIDDEN)
    with torch.no_grad():
        expected = other(**inputs).logits
        with vtc.share_encoder(clip, [*METHODS, hidden]):
            if how == "deepcopy":  # a model that ran carries hooks of transformers that cannot be saved
                assert torch.equal(clip(**inputs).logits, expected)
            made = COPIES[how](clip)
            again = COPIES[how](made)
            calls = counting(clip)
            for model in (made, again):
                assert torch.equal(model(**inputs).logits, expected)
        for model in (made, again, other):
            for weight in model.model.vision_tower.parameters():
                weight.zero_()
        zeroed = other(**inputs).logits
        for model in (made, again):
            assert torch.equal(model(**inputs).logits, zeroed)
            with vtc.share_encoder(model), vtc.compress(model, "random", retention=0.5) as handle:
                model(**inputs)
            assert handle.stats.retention == 0.5
            assert torch.equal(model(**inputs).logits, zeroed)
        assert calls == []
        assert torch.equal(clip(**inputs).logits, expected)


# --- nothing is held
def held(model: Any) -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("name", [NAME, "llava-next", "llava-onevision", "qwen2.5-vl", "internvl"])
def test_feature_calls_without_a_forward_pile_nothing_up(name: str) -> None:
    model, inputs = tiny_model(name), tiny_inputs(name, LAYOUT)
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    with torch.no_grad(), vtc.compress(model, "hiprune", retention=0.5):
        model(**inputs)
        model.get_image_features(**given)
        before = held(model)
        for _ in range(20):
            model.get_image_features(**given)
        assert held(model) <= before
        broken = model.model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        broken.remove()
        before = held(model)
        for _ in range(20):
            model.get_image_features(**given)
        assert held(model) <= before


@pytest.mark.parametrize("what", ["shared", "attached", "attached inside the encoder", "both"])
def test_a_dropped_model_is_freed(what: str) -> None:
    model = tiny_model(NAME)
    inputs = tiny_inputs(NAME, LAYOUT)
    if what in ("shared", "both"):
        vtc.share_encoder(model, [METHODS[0], ByClass(Rows.HIDDEN)]).__enter__()
    if what in ("attached", "both"):
        vtc.compress(model, "vtc_cls", retention=0.5)
    if what == "attached inside the encoder":
        vtc.compress(model, "mustdrop", retention=0.5)
    with torch.no_grad():
        model(**inputs)
        model.get_image_features(inputs["pixel_values"])
    alive = weakref.ref(model)
    assert taps._taps
    del model
    gc.collect()
    assert alive() is None
    assert (taps._taps, taps._users, taps._saved) == ({}, {}, {})
