"""Models whose weights accelerate moves in and out around every module, on the CPU and, for real, from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vtc
from vtc import adapters
from vtc.adapters.placement import device_of
from vtc.app import loading
from vtc.app.answer import answer
from vtc.errors import InputError
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import generate
from vtc.testing.pairs import tiny_pair

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
LAYOUT = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]
LLM = ("language_model", "lm_head")
PICTURE = Image.new("RGB", (168, 168), (200, 40, 40))


def spread(model: Any, folder: Path, *, llm: str, others: str) -> Any:
    """The model with the LLM and the parts in front of it on "cpu" or "disk" each."""
    parts = [name for name, _ in model.model.named_children()]
    placed = {**{f"model.{name}": llm if name in LLM else others for name in parts}, "lm_head": llm}
    return accelerate.dispatch_model(model, placed, offload_dir=folder)


def hooks(model: Any) -> dict[str, Any]:
    """What lies beside the class's own methods, by module."""
    return {
        name: {key: value for key, value in vars(module).items() if callable(value)}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("method", ["vtc_cls", FixedKeep(at=(0, 2))])
def test_offloaded_weights_change_nothing(name: str, method: Any) -> None:
    budget = {"retention": 0.5} if method == "vtc_cls" else {}
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1)
    expected = generate(model := tiny_model(name), inputs, vtc.compress(model, method, **budget), 4)
    offloaded = accelerate.cpu_offload(tiny_model(name), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    found = generate(offloaded, inputs, vtc.compress(offloaded, method, **budget), 4)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("disk", ["llm", "others"])
def test_parts_on_disk_change_nothing(tmp_path: Path, name: str, disk: str) -> None:
    """Readings of encoder and LLM, of what a layer would see, merging, and the KV cache after the prefill."""
    inputs = tiny_inputs(name, LAYOUT, seed=3, extra=1)
    model = tiny_model(name)
    parts = spread(tiny_model(name), tmp_path, **{"llm": "cpu", "others": "cpu", disk: "disk"})
    before = hooks(parts)
    for method in ("vtc_cls", "tome", "fastv", "pyramiddrop", "snapkv"):
        expected = generate(model, inputs, vtc.compress(model, method, retention=0.8), 3)
        found = generate(parts, inputs, vtc.compress(parts, method, retention=0.8), 3)
        assert torch.equal(found[0], expected[0]), method
        assert torch.equal(found[1], expected[1]), method
    assert hooks(parts) == before


# --- where a model computes
def test_the_device_is_where_weights_are_brought_to(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert device_of(tiny_model("llava-clip")) == cpu
    assert device_of(accelerate.cpu_offload(tiny_model("llava-clip"), execution_device=cpu)) == cpu
    parts = spread(tiny_model("llava-clip"), tmp_path, llm="cpu", others="disk")
    assert parts.device.type == "meta" and device_of(parts) == cpu
    several = torch.nn.Linear(2, 2)
    for hook in (accelerate.hooks.ModelHook(), accelerate.hooks.AlignDevicesHook(execution_device="cpu")):
        accelerate.hooks.add_hook_to_module(several, hook, append=True)
    assert device_of(several.to("meta")) == cpu


@pytest.mark.parametrize(("name", "retention"), [("quecc-tiny-llava", 1 / 9), ("vqtoken-tiny-llava", 0.25)])
def test_learned_parts_lie_where_the_llm_computes(tmp_path: Path, name: str, retention: float) -> None:
    parts = spread(loading.load("tiny-llava", device="cpu").model, tmp_path, llm="cpu", others="disk")
    with vtc.compress(parts, vtc.method.learned.load(name), retention=retention) as handle:
        assert {weight.device.type for weight in handle.module.parameters()} == {"cpu"}  # type: ignore[union-attr]
    accelerate.hooks.add_hook_to_module(
        adapters.of(parts).language_model, accelerate.hooks.AlignDevicesHook(execution_device="meta")
    )
    with vtc.compress(parts, vtc.method.learned.load(name), retention=retention) as handle:
        assert {weight.device.type for weight in handle.module.parameters()} == {"meta"}  # type: ignore[union-attr]


def test_a_pair_is_compared_with_an_encoder_on_disk(tmp_path: Path) -> None:
    inputs, given = tiny_inputs("llava-clip", LAYOUT, seed=3), {"retention": 0.5, "questions": ["red?", "ring?", "no"]}
    trim = vtc.create("trim", pair=tiny_pair("llava-clip"))
    parts = spread(tiny_model("llava-clip"), tmp_path, llm="cpu", others="disk")
    found = [
        generate(model, inputs, vtc.compress(model, trim, **given), 2) for model in (parts, tiny_model("llava-clip"))
    ]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_an_encoder_on_disk_is_shared(tmp_path: Path) -> None:
    """accelerate makes other parameters for every call, which are no change of weights."""
    inputs = tiny_inputs("llava-clip", LAYOUT, seed=3)
    parts = spread(tiny_model("llava-clip"), tmp_path, llm="cpu", others="disk")
    runs: list[None] = []
    parts.model.vision_tower.register_forward_hook(lambda *_: runs.append(None))
    with vtc.share_encoder(parts, [vtc.create("vtc_cls")]), torch.inference_mode():
        for retention in (0.5, 0.25):
            with vtc.compress(parts, "vtc_cls", retention=retention):
                parts(**inputs)
        parts(**inputs)
    assert len(runs) == 1


# --- models that are loaded so
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen", "tiny-internvl"])
@pytest.mark.parametrize("placed", [{"device": "balanced", "max_memory": {"cpu": "4MB"}}, {"device_map": {"": "disk"}}])
def test_a_model_larger_than_memory_answers_as_ever(name: str, placed: dict[str, Any]) -> None:
    whole, parts = loading.load(name, device="cpu"), loading.load(name, **placed)
    assert any(weight.is_meta for weight in parts.model.parameters())
    assert parts.fingerprint() == whole.fingerprint()
    given: dict[str, Any] = {"max_new_tokens": 3, "method": "fastv", "retention": 0.5}
    expected = answer(whole, [PICTURE], "What color is the circle?", **given)
    found = answer(parts, [PICTURE], "What color is the circle?", **given)
    assert (found.text, found.layer_tokens) == (expected.text, expected.layer_tokens)


def test_memory_is_given_to_what_is_spread() -> None:
    with pytest.raises(InputError, match="device='auto' is one; write device='balanced'"):
        loading.load("tiny-llava", max_memory={"cpu": "4MB"})
    with pytest.raises(InputError, match="offload_folder is for a model that is spread, and device='cpu' is one"):
        loading.load("tiny-llava", device="cpu", offload_folder="layers")
    with pytest.raises(InputError, match=r"cannot load model 'tiny-llava'.*`size` 4 apples"):
        loading.load("tiny-llava", device="balanced", max_memory={"cpu": "4 apples"})
