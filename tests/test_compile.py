"""torch.compile (dynamo with the eager back end) and PEFT wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import UnsupportedModel
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, generate

LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager", dynamic=True)


def _logits(model: Any, method: Any, attach_to: Any = None, **budget: Any) -> torch.Tensor:
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=3, extra=1)
    _, logits = generate(model, inputs, vtc.compress(attach_to or model, method, **budget), 4)
    return logits


def _deviation(model: Any, method: Any, **budget: Any) -> float:
    return float((_logits(model, method, **budget) - _logits(tiny_model("llava-clip"), method, **budget)).abs().max())


def test_language_model_forward_compiled_with_a_stage_before_it() -> None:
    model = tiny_model("llava-clip")
    _compile(model.model.language_model)
    torch._dynamo.utils.counters.clear()
    assert _deviation(model, "vtc_cls", retention=0.5) <= LIMIT
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


@pytest.mark.parametrize("at", [(0,), (0, 2)])
def test_layer_forwards_compiled(at: tuple[int, ...]) -> None:
    model = tiny_model("llava-clip")
    for layer in model.model.language_model.layers:
        _compile(layer)
    torch._dynamo.utils.counters.clear()
    assert _deviation(model, FixedKeep(at=at)) <= LIMIT
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


def test_whole_forward_with_stages_inside_warns() -> None:
    model = tiny_model("llava-clip")
    _compile(model.model.language_model)
    with pytest.warns(UserWarning, match="compile each layer's forward"):
        vtc.compress(model, FixedKeep(at=(0, 2))).detach()
    vtc.compress(model, FixedKeep(at=(0,))).detach()


def test_compiled_hooks_are_refused() -> None:
    model = tiny_model("llava-clip")
    with pytest.raises(UnsupportedModel, match=r"torch\.compile\(model\)"):
        vtc.compress(torch.compile(model, backend="eager"), "stride", retention=0.5)
    model.model.language_model.compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"\.compile\(\)"):
        vtc.compress(model, "stride", retention=0.5)


def test_peft_wrapped_model_equals_its_merged_one() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny_model("llava-clip"), config).eval()
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=3, extra=1)
    with vtc.compress(wrapped, "vtc_cls", retention=0.5) as handle:
        ids = wrapped.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert handle.stats.retention == 0.5
    merged = wrapped.merge_and_unload()
    with vtc.compress(merged, "vtc_cls", retention=0.5):
        expected = merged.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(ids, expected)
