"""Threads that share one compressed model do not meet: every method, interleaved at every layer by a barrier."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.method.base import Compressor, EncoderStage
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import with_fresh_weights
from vtc.testing.everything import OPTIONS

CLIP, QWEN = "llava-clip", "qwen2.5-vl"
LAYOUTS: list[list[list[Any]]] = [
    [[3, "image", 5]],
    [[4, "image", 3, "image", 5], [2, "image", 12], [9]],
    [[2, "image", 7], [6, "image", 2]],
]
ENCODER: dict[str, dict[str, Any]] = {
    "tome": {"inside": True},
    "visionzip": {"before": "projector"},
    "mustdrop": {},
    "aim": {},
}
"""Variants that act inside the encoder or before the projector."""


def together(model: Any, calls: list[Callable[[], Any]], meet: bool = True) -> list[Any]:
    """What the calls return, each from a thread of its own; they wait for each other around every layer.

    Our hooks run before these, so every thread has passed a stage before any goes on. The first error is raised.
    """
    barrier = threading.Barrier(len(calls), timeout=60)
    found: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []
    adapter, hooks = adapters.of(model), list[Any]()
    reached = 1 + adapter.spec.feature_layer
    places = [*list(adapter.vision_layers)[:reached], adapter.projector, *adapter.layers] if meet else []

    def wait(*_: Any) -> None:
        barrier.wait()

    for module in places:
        hooks += [module.register_forward_pre_hook(wait), module.register_forward_hook(wait)]

    def work(k: int) -> None:
        try:
            with torch.no_grad():
                barrier.wait()
                found[k] = calls[k]()
        except BaseException as error:
            errors.insert(0 if not isinstance(error, threading.BrokenBarrierError) else len(errors), error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    if errors:
        raise errors[0]
    return found


def batches(name: str, model: Any) -> list[dict[str, Tensor]]:
    return [tiny_inputs(name, layout, seed=seed, model=model) for seed, layout in enumerate(LAYOUTS)]


def check(model: Any, name: str, method: Compressor) -> vtc.Handle:
    """Three threads with other texts, pictures and numbers of pictures get what each gets alone."""
    budget = {"retention": 0.7} if method.needs_budget else {}
    inputs = batches(name, model)
    with vtc.compress(model, method, **budget) as handle, torch.no_grad():
        alone = [model(**given).logits for given in inputs]
        calls = [lambda given=given: model(**given).logits for given in inputs]
        for expected, logits in zip(alone, together(model, calls), strict=True):
            assert torch.equal(logits, expected)
    assert len(handle.trace) == len(handle.stats.calls) == 2 * len(inputs)
    for record, numbers in zip(handle.trace, handle.stats.calls, strict=True):
        assert all(len(keep) == numbers.batch for keep in record.keep.values())
    return handle


@pytest.mark.parametrize("name", [CLIP, QWEN])
@pytest.mark.parametrize("method", vtc.list_methods())
def test_every_method(method: str, name: str) -> None:
    model = tiny_model(name)
    check(model, name, with_fresh_weights(vtc.create(method, **OPTIONS.get(method, {})), adapters.of(model).spec))


@pytest.mark.parametrize("method", ENCODER)
def test_methods_inside_the_encoder(clip: Any, method: str) -> None:
    handle = check(clip, CLIP, vtc.create(method, **ENCODER[method]))
    assert any(isinstance(stage, EncoderStage) for stage in handle.plan.stages)


def test_two_encoder_stages(clip: Any) -> None:
    check(clip, CLIP, FixedKeep(at=(EncoderStage(1), EncoderStage(2), 0, 2), static=False))


def test_a_call_that_raised_leaves_nothing_to_the_next(clip: Any) -> None:
    given = tiny_inputs(CLIP, LAYOUTS[1])

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with vtc.compress(clip, "tome", inside=True, retention=0.5), torch.no_grad():
        expected = clip(**given).logits
        for place in (*list(adapters.of(clip).vision_layers)[1:3], adapters.of(clip).projector):
            hook = place.register_forward_hook(broken)
            with pytest.raises(ZeroDivisionError):
                clip(**tiny_inputs(CLIP, LAYOUTS[0]))
            hook.remove()
            assert torch.equal(clip(**given).logits, expected)


def test_the_tower_outside_a_feature_call_is_the_untouched_one(clip: Any) -> None:
    pixels = tiny_inputs(CLIP, LAYOUTS[1])["pixel_values"]
    with torch.no_grad():
        plain = clip.model.vision_tower(pixels).last_hidden_state
        with vtc.compress(clip, "tome", inside=True, retention=0.5):
            assert torch.equal(clip.model.vision_tower(pixels).last_hidden_state, plain)


def test_a_shared_encoder(clip: Any) -> None:
    inputs = batches(CLIP, clip)
    with torch.no_grad():
        alone = [clip(**given).logits for given in inputs]
    with vtc.share_encoder(clip, [vtc.create("vtc_cls")]) as shared:
        calls = [lambda given=given: clip(**given).logits for given in inputs]
        assert all(torch.equal(a, b) for a, b in zip(together(clip, calls), alone, strict=True))

        def again(given: dict[str, Tensor]) -> list[Tensor]:
            found = []
            for _ in range(20):
                found.append(clip(**given).logits)
                shared.clear()
            return found

        for found, expected in zip(
            together(clip, [lambda given=given: again(given) for given in inputs], meet=False), alone, strict=True
        ):
            assert all(torch.equal(logits, expected) for logits in found)


def test_the_loss_belongs_to_the_thread(clip: Any) -> None:
    method = with_fresh_weights(vtc.create("atp", lambda_sample=0.5), adapters.of(clip).spec)
    inputs = batches(CLIP, clip)
    barrier = threading.Barrier(len(inputs), timeout=60)
    with vtc.compress(clip, dataclasses.replace(method, training=True), pad_output=True) as handle:  # type: ignore[type-var]

        def loss(given: dict[str, Tensor]) -> Tensor:
            clip(**given, use_cache=False)
            if not torch.is_grad_enabled():
                barrier.wait()
            assert handle.auxiliary_loss is not None
            return handle.auxiliary_loss.detach()

        alone = [loss(given) for given in inputs]
        found = together(clip, [lambda given=given: loss(given) for given in inputs])
    assert len({float(value) for value in alone}) == len(inputs)
    assert [float(value) for value in found] == pytest.approx([float(value) for value in alone])


def test_counters_miss_no_call(clip: Any) -> None:
    text = {"input_ids": torch.arange(5, 12)[None]}
    with vtc.compress(clip, "random", retention=0.5) as handle:
        before = handle.stats.other_calls
        together(clip, [lambda: [clip(**text) for _ in range(40)]] * 3, meet=False)
        assert handle.stats.other_calls == before + 120
    assert handle.errors == []
