"""Training through the engine: loss and gradients equal those of the model with the dropped tokens masked out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.adapters.compat import repeats_hooks
from vtc.errors import UnsupportedCall
from vtc.method.base import Compressor, Positions
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import reference

LAYOUTS: dict[str, Any] = {
    "llava-clip": [[4, "image", 3, "image", 5], [2, "image", 12], [9]],
    "qwen2.5-vl": [[4, "image", 3, "video", 5], [2, "image", 12], [9]],
    "qwen3-vl": [[4, "image", 3, "video", 5], [2, "image", 12], [9]],
}
METHODS: list[tuple[Compressor, float | None]] = [
    (FixedKeep(at=(0,)), None),
    (FixedKeep(at=(0, 2)), None),
    (FixedKeep(at=(1,), static=False), None),
    (vtc.create("vtc_cls"), 0.5),
]
IDS = ["before the LLM", "before and inside", "adaptive", "vtc_cls"]


def labelled(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Labels on every text token whose predecessor is text."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    silent = ~mask
    for token in adapters.of(model).placeholders.values():
        silent = silent | (ids == token)
    labels = ids.masked_fill(silent, -100)
    labels[:, 1:][silent[:, :-1]] = -100
    return {**inputs, "labels": labels}


def train(model: Any, inputs: dict[str, Tensor], manager: AbstractContextManager[Any]) -> dict[str, Tensor]:
    """Loss, gradients of all parameters that got one, and of the rows that enter the first layer's visual tokens."""
    model.zero_grad(set_to_none=True)
    rows: list[Tensor] = []

    def watch(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        output.retain_grad()
        rows.append(output)

    hook = adapters.of(model).projector.register_forward_hook(watch, with_kwargs=True)
    try:
        with manager:
            loss = model(**inputs).loss
        loss.backward()
    finally:
        hook.remove()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    for number, row in enumerate(rows):
        assert row.grad is not None
        found[f"visual rows {number}"] = row.grad.flatten(0, -2).clone()
    return {"loss": loss.detach(), **found}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a gradient, relative to the largest entry of that gradient.

    A key's bias moves all logits of a row alike, so its gradient is nothing but rounding: hence the floor.
    """
    assert found.keys() == expected.keys()
    differences = {k: float((found[k] - v).abs().max()) / max(float(v.abs().max()), 1e-2) for k, v in expected.items()}
    return max(differences.values())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("method", "retention"), METHODS, ids=IDS)
@pytest.mark.parametrize("policy", ["preserve", "compact"])
def test_loss_and_gradients_equal_the_oracles(
    name: str, method: Compressor, retention: float | None, policy: Positions, limits: Any
) -> None:
    model = tiny_model(name)
    inputs = labelled(model, tiny_inputs(name, LAYOUTS[name], seed=3, extra=1, model=model))
    handle = vtc.compress(model, method, retention=retention, positions=policy, pad_output=True)
    found = train(model, inputs, handle)
    expected = train(model, inputs, reference(model, handle))
    assert float((found["loss"] - expected["loss"]).abs()) <= limits.logits
    assert worst(found, expected) <= limits.gradient
    plain = train(model, inputs, nullcontext())
    assert worst(found, {k: plain[k] for k in expected}) > limits.broken


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_kept_tokens_get_gradients(name: str) -> None:
    model = tiny_model(name)
    layout: Any = [[4, "image", 5]]
    inputs = labelled(model, tiny_inputs(name, layout, seed=3, model=model))
    handle = vtc.compress(model, "random", retention=0.5, pad_output=True)
    rows = train(model, inputs, handle)["visual rows 0"]
    (item,) = handle.trace[0].items
    touched = (rows != 0).any(-1).nonzero().flatten()
    if name == "qwen2.5-vl":  # the merger's output is in window order
        assert len(touched) == len(item.kept[0]) < len(rows)
    else:
        assert torch.equal(touched, item.kept[0])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("method", "retention"), METHODS, ids=IDS)
def test_gradient_checkpointing_changes_nothing(
    name: str, method: Compressor, retention: float | None, limits: Any
) -> None:
    model = tiny_model(name)
    inputs = labelled(model, tiny_inputs(name, LAYOUTS[name], seed=3, extra=1, model=model))
    handle = vtc.compress(model, method, retention=retention, pad_output=True)
    expected = train(model, inputs, handle)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    handle = vtc.compress(model, method, retention=retention, pad_output=True)
    if repeats_hooks() and (handle.plan.stages != (0,) or adapters.of(model).deepstack):
        with pytest.raises(UnsupportedCall, match="recomputes a layer together with its hooks"):
            train(model, inputs, handle)
        return
    found = train(model, inputs, handle)
    assert float((found["loss"] - expected["loss"]).abs()) <= limits.logits
    assert worst(found, expected) <= limits.gradient
