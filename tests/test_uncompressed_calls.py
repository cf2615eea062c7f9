"""Calls that would silently run without compression, and outputs whose rows would silently be others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import vtc
from vtc.engine.guards import CompressionWarning
from vtc.errors import UnsupportedCall, UnsupportedModel
from vtc.testing import FixedKeep, tiny_inputs, tiny_model

PAIR = [[3, "image", 5], [2, "image", 9]]


@torch.no_grad()
def test_embeddings_without_pixels_are_warned_of_once(clip: Any) -> None:
    rows = clip.get_input_embeddings()(torch.full((1, 6), 7))
    with vtc.compress(clip, FixedKeep()):
        with pytest.warns(CompressionWarning, match="without compression"):
            clip.generate(inputs_embeds=rows, max_new_tokens=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            clip.generate(inputs_embeds=rows, max_new_tokens=3)
            clip(input_ids=torch.full((1, 6), 7))


def test_continuous_batching_is_refused(clip: Any) -> None:
    with vtc.compress(clip, FixedKeep()), pytest.raises(UnsupportedCall, match=r"generate_batch\(\) packs prompts"):
        clip.generate_batch([[1, 2, 3]])
    assert "generate_batch" not in vars(clip)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["model", "backbone"])
@pytest.mark.parametrize("how", ["forward", "compile"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_code_compiled_around_the_hooks_is_refused(clip: Any, part: str, how: str, when: str) -> None:
    module = clip if part == "model" else clip.model
    inputs = tiny_inputs("llava-clip", PAIR)

    def change() -> None:
        if how == "forward":
            module.forward = torch.compile(module.forward, backend="eager", dynamic=True)
        else:
            module.compile(backend="eager")

    if when == "before":
        change()
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=r"compile"), vtc.compress(clip, "fastv", retention=0.7):
        change()
        clip(**inputs)


@torch.no_grad()
def test_hooks_that_did_not_run_are_noticed(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", PAIR)
    for module in (clip.model, clip.model.language_model, clip.model.language_model.layers[2]):
        with vtc.compress(clip, FixedKeep(at=(0, 2))):
            module._forward_pre_hooks.clear()
            with pytest.raises(UnsupportedModel, match="hooks of the compression did not run"):
                clip(**inputs)


# --- rows of the output
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "internvl", "qwen2.5-vl"])
@pytest.mark.parametrize("wanted", [3, torch.tensor([1, 4, -1]), torch.tensor([12])])
def test_rows_asked_for_by_number_are_rows_of_the_input(name: str, wanted: Any) -> None:
    model, inputs = tiny_model(name), tiny_inputs(name, PAIR)
    with vtc.compress(model, FixedKeep(at=(0, 2)), pad_output=True):
        every = model(**inputs).logits
    with vtc.compress(model, FixedKeep(at=(0, 2))):
        some = model(**inputs, logits_to_keep=wanted).logits
    expected = every[:, -wanted:] if isinstance(wanted, int) else every[:, wanted]
    torch.testing.assert_close(some, expected)


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
def test_padded_hidden_states_lie_at_the_input_positions(clip: Any, return_dict: bool) -> None:
    inputs = tiny_inputs("llava-clip", PAIR)
    length = inputs["input_ids"].shape[1]
    with vtc.compress(clip, FixedKeep(at=(0, 2)), pad_output=True) as handle:
        output = clip(**inputs, output_hidden_states=True, return_dict=return_dict)
    states = output.hidden_states if return_dict else output[2]
    assert [rows.shape[1] for rows in states] == [length] * 5
    kept = handle.trace[0].keep
    for number, stage in enumerate([0, 0, 0, 2, 2]):
        assert torch.equal(states[number].abs().sum(-1) > 0, kept[stage])


def test_attentions_beside_padded_outputs_are_refused() -> None:
    model = tiny_model("llava-clip", attn_implementation="eager")
    with vtc.compress(model, FixedKeep(), pad_output=True), pytest.raises(UnsupportedCall, match="output_attentions"):
        model(**tiny_inputs("llava-clip", PAIR), output_attentions=True)
