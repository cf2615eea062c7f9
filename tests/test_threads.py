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
from vtc.method.base import Compressor, EncoderStage, Selection, Stage, StageView
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import with_fresh_weights
from vtc.testing.everything import limits, runs, small
from vtc.testing.pairs import with_tiny_pair

CLIP, QWEN = "llava-clip", "qwen2.5-vl"
LAYOUTS: list[list[list[Any]]] = [
    [[3, "image", 5]],
    [[4, "image", 3, "image", 5], [2, "image", 12], [9]],
    [[2, "image", 7], [6, "image", 2]],
]
ALIKE: list[list[list[Any]]] = [[[4, "image", 3, "image", 5], [2, "image", 12], [9]]] * 3
"""Batches of one shape with other pictures: what one thread finds of another fits, and only numbers differ."""
ENCODER: dict[str, dict[str, Any]] = {
    "tome": {"inside": True},
    "pitome": {"inside": True},
    "diffrate": {},
    "expediting_vit": {},
    "pixelprune": {},
    "token_transforming": {},
    "zero_tprune": {},
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


def batches(name: str, model: Any, layouts: Any = LAYOUTS) -> list[dict[str, Tensor]]:
    return [tiny_inputs(name, layout, seed=seed, model=model) for seed, layout in enumerate(layouts)]


def check(model: Any, name: str, method: Compressor, layouts: Any = LAYOUTS, **told: Any) -> vtc.Handle:
    """Three threads with other texts, pictures and, in LAYOUTS, numbers of pictures get what each gets alone."""
    budget = limits(method)
    inputs = batches(name, model, layouts)
    with vtc.compress(model, method, **budget, **told) as handle, torch.no_grad():
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
    model, chosen = tiny_model(name), small(method)
    if not runs(chosen, adapters.of(model).spec):
        pytest.skip("does not run on this family")
    chosen, told = with_tiny_pair(with_fresh_weights(chosen, adapters.of(model).spec), name)
    check(model, name, chosen, **told)


@pytest.mark.parametrize("layouts", [LAYOUTS, ALIKE], ids=["other shapes", "one shape"])
@pytest.mark.parametrize("method", ENCODER)
def test_methods_inside_the_encoder(clip: Any, method: str, layouts: Any) -> None:
    handle = check(clip, CLIP, vtc.create(method, **ENCODER[method]), layouts)
    assert any(isinstance(stage, EncoderStage) for stage in handle.plan.stages)


def test_no_method_inside_the_encoder_is_left_out(clip: Any) -> None:
    """Every method whose plan has an encoder stage, by default or by one of its options that say where it acts."""
    spec, found = adapters.of(clip).spec, set[str]()
    for name in vtc.list_methods():
        for options in ({}, {"inside": True}, {"before": "projector"}):
            try:
                method = vtc.create(name, **options)
            except vtc.VTCError:
                continue
            if any(isinstance(stage, EncoderStage) for stage in method.plan(spec).stages):
                found.add(name)
    assert found == set(ENCODER)


@pytest.mark.parametrize("layouts", [LAYOUTS, ALIKE], ids=["other shapes", "one shape"])
def test_two_encoder_stages(clip: Any, layouts: Any) -> None:
    check(clip, CLIP, FixedKeep(at=(EncoderStage(1), EncoderStage(2), 0, 2), static=False), layouts)


@dataclasses.dataclass(frozen=True)
class Remembers(FixedKeep):
    """Counts the stages of a call in the memory, and notes what it found there."""

    found: list[tuple[Stage, int]] = dataclasses.field(default_factory=list, compare=False)

    def select(self, view: StageView) -> Selection:
        self.found.append((view.stage, view.memory.setdefault("stages", 0)))
        view.memory["stages"] += 1
        return super().select(view)


@pytest.mark.parametrize("name", [CLIP, "llava-siglip"])
def test_memory_begins_and_ends_with_a_call(name: str) -> None:
    """The encoder's calls have one of their own, from stage to stage, and so has every forward pass of the LLM."""
    model = tiny_model(name)
    stages = (EncoderStage(1), EncoderStage(2), 0, 2, vtc.AFTER_PREFILL)
    expected = list(zip(stages, (0, 1, 0, 1, 2), strict=True))
    method = Remembers(at=stages)
    given = [tiny_inputs(name, layout) for layout in LAYOUTS]

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with vtc.compress(model, method), torch.no_grad():
        for inputs in given:
            model(**inputs)
            assert method.found == expected
            method.found.clear()
        for place in (adapters.of(model).vision_layers[1], adapters.of(model).layers[1]):
            hook = place.register_forward_hook(broken)
            with pytest.raises(ZeroDivisionError):
                model(**given[0])
            hook.remove()
            assert method.found
            method.found.clear()
            model(**given[1])
            assert method.found == expected
            method.found.clear()
        together(model, [lambda inputs=inputs: model(**inputs) for inputs in given])
    assert sorted(map(repr, method.found)) == sorted(map(repr, expected * 3))


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
