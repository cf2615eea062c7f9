"""Training under gradient checkpointing: gradients equal those without it, or the call is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc.errors import UnsupportedCall
from vtc.method.base import AFTER_PREFILL
from vtc.testing import FixedKeep, tiny_inputs, tiny_model

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fastv": ("fastv", {"retention": 0.7}),
    "mustdrop": ("mustdrop", {"retention": 0.5}),
    "todre": ("todre", {"retention": 0.7}),
    "atp_training_free": ("atp_training_free", {"retention": 0.7}),
    "eviction": (FixedKeep(at=(0, AFTER_PREFILL)), {}),
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def _step(name: str, method: Any, options: dict[str, Any], reentrant: bool | None) -> tuple[float, dict[str, Any]]:
    model = tiny_model(name).train()
    inputs = dict(tiny_inputs(name, [[4, "image", 7], [2, "image", 9]], model=model))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = torch.where((ids > 119) | (mask == 0), -100, ids)
    labels[:, :-4] = -100
    model.enable_input_require_grads()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with vtc.compress(model, method, pad_output=True, **options):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    grads = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    return loss.item(), grads


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava-clip", "internvl", "qwen2.5-vl"])
def test_gradients_equal_those_without_checkpointing(name: str, method: str, reentrant: bool, limits: Any) -> None:
    try:
        loss, grads = _step(name, *METHODS[method], None)
    except vtc.VTCError as refused:
        pytest.skip(str(refused))
    again, others = _step(name, *METHODS[method], reentrant)
    assert abs(loss - again) <= limits.logits
    assert grads.keys() == others.keys()
    for key, grad in grads.items():
        assert float((grad - others[key]).abs().max()) <= limits.gradient * (float(grad.abs().max()) + 1e-6), key


def test_a_method_that_learns_from_llm_layers_is_refused(clip: Any) -> None:
    clip.train().gradient_checkpointing_enable()
    inputs = tiny_inputs("llava-clip", [[4, "image", 7]])
    with vtc.compress(clip, "atp", training=True), pytest.raises(UnsupportedCall, match="checkpointing_disable"):
        clip(**inputs, use_cache=False)


def test_gains_are_refused(clip: Any) -> None:
    """The backward pass would run the MLPs without them."""
    clip.train().gradient_checkpointing_enable()
    inputs = tiny_inputs("llava-clip", [[4, "image", 7]])
    with (
        vtc.compress(clip, FixedKeep(at=(1,), skips=(1,), gains=True)),
        pytest.raises(UnsupportedCall, match=r"weighs what the MLPs .*checkpointing_disable"),
    ):
        clip(**inputs, use_cache=False)


def test_a_filled_cache_is_refused(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", [[4, "image", 7]])
    with vtc.compress(clip, FixedKeep()):
        cache = clip(**inputs, use_cache=True).past_key_values
        clip.train().gradient_checkpointing_enable()
        with pytest.raises(UnsupportedCall, match="ignores the KV cache"):
            clip(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
