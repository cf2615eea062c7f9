"""Models whose weights accelerate moves in and out around every module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import generate

LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("method", ["vtc_cls", FixedKeep(at=(0, 2))])
def test_offloaded_weights_change_nothing(name: str, method: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    budget = {"retention": 0.5} if method == "vtc_cls" else {}
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1)
    expected = generate(model := tiny_model(name), inputs, vtc.compress(model, method, **budget), 4)
    offloaded = accelerate.cpu_offload(tiny_model(name), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    found = generate(offloaded, inputs, vtc.compress(offloaded, method, **budget), 4)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
