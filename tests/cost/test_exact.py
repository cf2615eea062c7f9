"""`exact` against what torch counts while unmodified models of every family run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vtc import adapters
from vtc.cost.exact import Work, cost
from vtc.cost.schedule import constant
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.models import TINY_MODELS

PROMPTS: dict[str, list[Any]] = {"one image": [3, "image", 5], "two images": [2, "image", 9, "image", 4], "text": [7]}


def model_of(name: str) -> Any:
    model = tiny_model(name)
    if name == "qwen3-vl-moe":
        model.set_experts_implementation("eager")  # torch counts no grouped matrix product
    return model


def counted(model: Any, inputs: dict[str, Any], **more: Any) -> tuple[int, Any]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(**inputs, **more)
    return counter.get_total_flops(), output


def visual_tokens(model: Any, inputs: dict[str, Any]) -> int:
    ids = torch.tensor(list(adapters.of(model).placeholders.values()))
    return int(torch.isin(inputs["input_ids"], ids).sum())


def work(model: Any, inputs: dict[str, Any], **more: Any) -> Work:
    adapter, visual = adapters.of(model), visual_tokens(model, inputs)
    text = inputs["input_ids"].shape[1] - visual
    return Work(constant(adapter.spec.llm_layers, visual), text, adapter.encoded(inputs), **more)


@pytest.mark.parametrize("prompt", [*PROMPTS, "a video"])
@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_prefill_is_what_torch_counts(name: str, prompt: str) -> None:
    if prompt == "a video" and "video" not in TINY_MODELS[name].kinds:
        pytest.skip("takes no videos")
    model = model_of(name)
    inputs = tiny_inputs(name, [PROMPTS.get(prompt, [2, "video", 6, "image"])], model=model)
    ours = cost(adapters.of(model).shape(model.config), work(model, inputs, logits=1))
    assert counted(model, inputs, logits_to_keep=1)[0] == ours.prefill


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_decoding_and_cache_are_what_runs(name: str) -> None:
    model = model_of(name)
    inputs = tiny_inputs(name, [[3, "image", 5]], model=model)
    ours = cost(adapters.of(model).shape(model.config), work(model, inputs, new_tokens=4), element=4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert counter.get_total_flops() == ours.total
    _, output = counted(model, inputs, use_cache=True)
    layers = output.past_key_values.layers
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == ours.kv_bytes
