"""`exact` against what torch counts while unmodified models of every family run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.app.costs import CostMeter
from vtc.cost.exact import Work, cost
from vtc.cost.token_counts import constant
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.everything import runs, small
from vtc.testing.models import TINY_MODELS
from vtc.testing.pairs import with_tiny_pair
from vtc.testing.tiny_llava_onevision import unshrunk

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


WHOLE = {"fastv", "globalcom2", "hiprune", "pool", "pyramiddrop", "random", "stride", "vtc_cls"}
"""Methods without matrix products beside what they read of attention."""
SIMILAR = {"fastvid", "flashvid", "gprune", "holitom", "vqtoken_codebook", "zero_tprune"}
"""Methods that cluster or rank by page rank."""
INSIDE = set(vtc.list_methods(stage="encoder", trained=False))


def spent(model: Any, method: Any, inputs: dict[str, Any], **budget: Any) -> tuple[int, tuple[Work, ...], CostMeter]:
    """What torch counts in a prefill under a method, and the work of its questions."""
    with vtc.compress(model, method, **budget) as handle:
        total, _ = counted(model, inputs, logits_to_keep=1)
    (call,) = handle.stats.calls
    meter = CostMeter(model)
    text = [int(mask.sum()) - n for mask, n in zip(inputs["attention_mask"], call.visual_tokens_in, strict=True)]
    full = meter.untouched(inputs, call.visual_tokens_in, text)
    assert full is not None
    return total, meter.compressed(full, handle, call), meter


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
@pytest.mark.parametrize("registered", vtc.list_methods(trained=False))
def test_the_rest_under_a_method_is_the_method_itself(registered: str, name: str) -> None:
    """Tower, projector and LLM are exact with the counts of the call; so are readings. What a method multiplies
    besides, similarities above all, is not declared: up to a tenth of these tiny models for clustering and page rank
    and a thirtieth for others, since tokens are as many as they are wide; inside encoders that join patches they are
    as wide as all their patches, which doubles it.
    """
    model, method = model_of(name), small(registered)
    if not runs(method, adapters.of(model).spec):
        pytest.skip("does not run on this family")
    method, told = with_tiny_pair(method, name)
    inputs = tiny_inputs(name, [[3, "image", 5]], model=model)
    budget = {"retention": 0.7} if method.needs_budget else {}
    try:
        total, (one,), meter = spent(model, method, inputs, **told, **budget)
    except vtc.errors.UnsupportedMethod:
        pytest.skip("does not run on this map, which is resized")
    rest = total - meter.cost(one).prefill
    if registered in WHOLE:
        assert rest == 0
    else:
        share = 0.11 if registered in SIMILAR else 0.04
        unread = type(method).reads is not vtc.Compressor.reads  # what it plans to read counts, needed or not
        deep = registered == "expediting_vit" and name.startswith("qwen3")  # deep features of what it had not restored
        separators = registered == "trim"  # count as if they were projected to where its pair compares them
        least = -0.01 * total if deep or unread or separators else 0
        assert least <= rest <= (max(share, 0.08) if registered in INSIDE else share) * total


@pytest.mark.parametrize("name", ["llava-onevision", "llava-next-video", "internvl", "qwen2-vl", "qwen3-vl"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_towers_that_join_patches_are_counted_as_they_run(name: str, kind: Any) -> None:
    """Nothing but the model multiplies where patches are compared pixel by pixel."""
    model, method = model_of(name), vtc.create("pixelprune", tau=None)
    with unshrunk():
        inputs = tiny_inputs(name, [[3, kind, 5]], model=model)
    total, (one,), meter = spent(model, method, inputs, retention=0.6)
    assert total == pytest.approx(meter.cost(one).prefill, rel=1e-12)
    assert one.shortened or one.projected


def test_windows_get_shorter_too() -> None:
    """By how much each depends on the picture: in the mean as much as the whole."""
    model, method = model_of("qwen2.5-vl"), vtc.create("pixelprune", tau=None)
    inputs = tiny_inputs("qwen2.5-vl", [[3, "image", 5]], model=model)
    total, (one,), meter = spent(model, method, inputs, retention=0.6)
    assert total == pytest.approx(meter.cost(one).prefill, rel=0.01)


def test_questions_of_a_batch_add_up() -> None:
    """Where no row is padded, the questions' costs are the batch's."""
    model = model_of("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5], [1, "image", 7], [4, "image", 4]], model=model)
    total, works, meter = spent(model, "fastv", inputs, retention=0.7)
    assert sum(meter.cost(work).prefill for work in works) == total


def test_pictures_are_shared_out_by_visual_tokens() -> None:
    model = model_of("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5, "image"], [1, "image", 7], [4]], model=model)
    total, works, meter = spent(model, "random", inputs, retention=0.5)
    towers = [meter.cost(work).tower for work in works]
    assert towers == [2 * towers[1], towers[1], 0]
    assert total > sum(meter.cost(work).prefill for work in works)  # the shorter rows are padded


def test_a_family_without_sizes_has_no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava-clip")
    monkeypatch.setattr(type(adapters.of(model)), "shape", classmethod(Adapter.shape.__func__))  # type: ignore[attr-defined]
    assert CostMeter(model).shape is None
    with pytest.raises(vtc.errors.UnsupportedModel, match="tells no sizes"):
        adapters.of(model).shape(model.config)
