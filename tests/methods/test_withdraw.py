"""Withdrawal: the layers behind it see text alone, and the text rows are those of a model that masks the picture."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)


@pytest.mark.parametrize("name", TINY_MODELS)
@torch.no_grad()
def test_later_layers_see_text_alone(name: str) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        layout: Any = [[4, kind, 3, kind, 5], [2, kind, 12]]
        inputs = tiny_inputs(name, layout, seed=1, model=model)
        with vtc.compress(model, "withdraw", layer=16) as handle:
            model(**inputs)
        (call,) = handle.stats.calls
        layers = len(call.layer_rows)
        first, text = (layers + 1) // 2, inputs["attention_mask"].sum(1).tolist()
        longest = max(total - seen for total, seen in zip(text, call.visual_tokens_in, strict=True))
        assert call.layer_rows[first:] == call.kv_rows[first:] == (longest,) * (layers - first)
        assert call.layer_rows[:first] == (inputs["input_ids"].shape[1],) * first
        assert call.entering[1:] == ((layers - first, (0, 0)),)
        assert handle.stats.retention == first / layers


@torch.no_grad()
def test_the_text_is_that_of_masked_visual_keys() -> None:
    """YOPO's own way: the tokens stay in place, and in the last of four layers the text does not attend to them."""
    model = tiny_model("llava-clip", attn_implementation="eager")
    inputs = tiny_inputs("llava-clip", [[4, "image", 5]], seed=3, model=model)
    last = model.model.language_model.layers[3]

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        mask[..., 20:, 4:20] = torch.finfo(mask.dtype).min  # the text behind 16 visual tokens
        return args, {**kwargs, "attention_mask": mask}

    hook = last.register_forward_pre_hook(hide, with_kwargs=True)
    expected = model(**inputs).logits[:, -5:]
    hook.remove()
    plain = model(**inputs).logits[:, -5:]
    with vtc.compress(model, "withdraw", layer=24):
        found = model(**inputs).logits[:, -5:]
    assert float((found - expected).abs().max()) < 5e-5 < float((found - plain).abs().max())


@torch.no_grad()
def test_answers_of_two_turns_go_on_without_the_picture() -> None:
    model = tiny_model("llava-clip")
    first = tiny_inputs("llava-clip", [[4, "image", 5]], seed=3, model=model)
    second = tiny_inputs("llava-clip", [[6]], seed=4, model=model)
    with vtc.compress(model, "withdraw", layer=16):
        cache = model(**first, use_cache=True).past_key_values
        assert [layer.get_seq_length() for layer in cache.layers] == [25, 25, 9, 9]
        model(input_ids=second["input_ids"], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [31, 31, 15, 15]


def test_plans_and_refusals() -> None:
    method = vtc.create("withdraw")
    assert not method.needs_budget
    for depth, layer in ((32, 20), (28, 18), (40, 25), (4, 3), (2, 1)):
        assert method.plan(dataclasses.replace(LLAMA, llm_layers=depth)) == vtc.Plan((layer,), vtc.Needs(), "preserve")
    for wrong in (0, 32, -1):
        with pytest.raises(VTCError, match=f"layer={wrong} is none of layers 1 to 31 of 32; YOPO uses 20"):
            vtc.create("withdraw", layer=wrong)
    with pytest.raises(UnsupportedMethod, match="lies behind the last of the 1 LLM layers of this llava model; pass"):
        method.plan(dataclasses.replace(LLAMA, llm_layers=1))
    with pytest.raises(BudgetError, match="'withdraw' takes no retention or keep"):
        vtc.compress(tiny_model("llava-clip"), "withdraw", retention=0.5)
