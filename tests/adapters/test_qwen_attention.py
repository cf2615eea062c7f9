"""Attention taps in Qwen-VL: one call per frame or window under SDPA, one call for all of them under FlashAttention."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

import vtc
from vtc import adapters
from vtc.batch.context import VisionContext
from vtc.engine.encoder import VisionRecorder
from vtc.engine.taps import AttentionCall, TapSet
from vtc.method.base import Needs, Rows
from vtc.methods.vtc_cls import VTCCLS
from vtc.ops.attention import attention_received, attention_rows
from vtc.ops.select import top_k
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.contract import generate
from vtc.testing.tiny_qwen import MERGE

NAMES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe"]
LAYOUTS: dict[str, Any] = {
    "image": [[3, "image", 5, "image", 2], [2, "image", 9]],
    "video": [[3, "video", 5], [2, "video", 9, "video"]],
}
Weights = dict[str, list[list[Tensor]]]


@torch.no_grad()
def eager_weights(name: str, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Weights:
    """[B, H, Q, K] weights of every call of every attention module; the vision modules themselves throw theirs away."""
    model = tiny_model(name, attn_implementation="eager")
    seen: dict[Any, list[Tensor]] = defaultdict(list)
    source = sys.modules[type(model).__module__]
    original = source.eager_attention_forward

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(module, *args, **kwargs)
        seen[module].append(output[1])
        return output

    with monkeypatch.context() as patch:
        patch.setattr(source, "eager_attention_forward", recording)
        model(**inputs)
    adapter = adapters.of(model)
    return {"vision": [seen[m] for m in adapter.vision_attention], "llm": [seen[m] for m in adapter.llm_attention]}


@torch.no_grad()
def tapped(model: Any, inputs: dict[str, Tensor], tap: Callable[[AttentionCall], Any]) -> tuple[Weights, Tensor]:
    """What `tap` returns for every call of every attention module, and the logits."""
    adapter = adapters.of(model)
    modules = {"vision": list(adapter.vision_attention), "llm": list(adapter.llm_attention)}
    seen: dict[Any, list[Any]] = defaultdict(list)
    taps = TapSet((m, lambda call, m=m: seen[m].append(tap(call))) for side in modules.values() for m in side)
    taps.install()
    try:
        logits = model(**inputs).logits
    finally:
        taps.remove()
    return {side: [seen[m] for m in found] for side, found in modules.items()}, logits


def every_row(call: AttentionCall) -> Tensor:
    batch, _, length, _ = call.query.shape
    rows = torch.arange(length).expand(batch, -1)
    return attention_rows(call.query, call.key, rows, call.scaling, mask=call.mask, causal=call.causal, chunk=7)


@torch.no_grad()
def recorded(model: Any, inputs: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """kind -> encoder layer -> [I, Nmax] attention per token, as methods get it."""
    adapter = adapters.of(model)
    needs, found = Needs(dict.fromkeys(range(len(adapter.vision_layers)), Rows.RECEIVED)), list[VisionContext]()
    recorder = VisionRecorder(adapter, needs, encoded=lambda context, output: found.append(context))
    recorder.install()
    try:
        model(**inputs)
        return {context.kind: {k: v for (k, _), v in context.attention.items()} for context in found}
    finally:
        recorder.remove()


def grids_of(inputs: dict[str, Tensor], kind: str) -> list[tuple[int, int, int]]:
    return [(t, h, w) for t, h, w in inputs[f"{kind}_grid_thw"].tolist()]


def by_token(model: Any, calls: list[Tensor], grids: list[tuple[int, int, int]]) -> list[Tensor]:
    """Attention received per token in raster order, one [n] per item, from the eager weights of one layer."""
    received = torch.cat([weights.mean((1, 2))[0] for weights in calls])
    units = received.view(-1, MERGE**2).mean(1)
    visual = model.model.visual
    if hasattr(visual, "window_size"):
        index, _ = get_vision_window_index(torch.tensor(grids), MERGE, visual.window_size, visual.patch_size)
        units = torch.empty_like(units).index_put((index,), units)
    return list(torch.split(units, [t * h * w // MERGE**2 for t, h, w in grids]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_of_every_layer_equal_eager_weights(
    name: str, kind: str, limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUTS[kind], extra=1, model=model)
    expected = eager_weights(name, inputs, monkeypatch)
    found, logits = tapped(model, inputs, every_row)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    real = inputs["attention_mask"].bool()
    for side in ("vision", "llm"):
        assert [len(calls) for calls in found[side]] == [len(calls) for calls in expected[side]]
        for rows, weights in zip(chain(*found[side]), chain(*expected[side]), strict=True):
            here = real if side == "llm" else torch.ones(weights.shape[::2], dtype=torch.bool)
            assert float((rows - weights.mean(1))[here].abs().max()) <= limits.attention
            assert float((rows.sum(-1) - 1).abs().max()) <= limits.attention
    frames = sum(t for t, _, _ in grids_of(inputs, kind))
    calls = [len(calls) for calls in found["vision"]]
    windowed = name == "qwen2.5-vl"
    assert [count > frames for count in calls] == [windowed, False, windowed, False]
    assert calls[1] == calls[3] == frames


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_received_attention_reaches_methods_per_token_in_raster_order(
    name: str, kind: str, limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUTS[kind], model=model)
    eager = eager_weights(name, inputs, monkeypatch)["vision"]
    found = recorded(model, inputs)[kind]
    assert sorted(found) == [0, 1, 2, 3]
    for layer, values in found.items():
        expected = by_token(model, eager[layer], grids_of(inputs, kind))
        assert values.shape == (len(expected), max(len(item) for item in expected))
        for row, item in zip(values, expected, strict=True):
            assert float((row[: len(item)] - item).abs().max()) <= limits.attention
            assert not row[len(item) :].any()
        peaks = [float(item.max() / item.mean()) for item in expected if len(item) > 4]
        assert max(peaks) > 1.3  # far enough from uniform for the comparison to mean something


# --- FlashAttention
def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """What a variable-length kernel computes: attention inside each of the packed sequences."""
    sequences = kwargs["cu_seq_lens_q"].diff().tolist()
    parts = [torch.split(tensor, sequences, dim=2) for tensor in (query, key, value)]
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Models whose vision encoder takes the FlashAttention path, with an emulated kernel."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", packed_attention)

    def build(name: str) -> Any:
        model = tiny_model(name)
        model.config.vision_config._attn_implementation_internal = "flash_attention_2"
        return model

    return build


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_packed_call_gives_what_one_call_per_sequence_gives(
    name: str, kind: str, limits: Any, flash: Callable[[str], Any]
) -> None:
    model, plain = flash(name), tiny_model(name)
    inputs = tiny_inputs(name, LAYOUTS[kind], model=model)
    found, logits = tapped(model, inputs, lambda call: call.segments)
    expected_calls, expected_logits = tapped(plain, inputs, lambda call: call.segments)
    assert [len(calls) for calls in found["vision"]] == [1, 1, 1, 1]
    assert all(segments is None for calls in expected_calls["vision"] for segments in calls)
    assert float((logits - expected_logits).abs().max()) <= limits.logits
    packed, split = recorded(model, inputs)[kind], recorded(plain, inputs)[kind]
    for layer in range(4):
        assert float((packed[layer] - split[layer]).abs().max()) <= limits.attention


@pytest.mark.parametrize("name", NAMES)
def test_vtc_cls_keeps_the_same_tokens_on_both_paths(name: str, flash: Callable[[str], Any]) -> None:
    kept = []
    for model in (flash(name), tiny_model(name)):
        inputs = tiny_inputs(name, LAYOUTS["video"], model=model)
        with vtc.compress(model, "vtc_cls", retention=0.3) as handle, torch.no_grad():
            model(**inputs)
        kept.append([item.kept[0].tolist() for item in handle.trace[0].items])
    assert kept[0] == kept[1]


def test_segments_of_any_length_stream_in_any_chunks(limits: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (3 * torch.randn(1, 2, 41, 8, generator=generator) for _ in range(2))
    ends = torch.tensor([0, 5, 10, 11, 11, 24, 29, 41], dtype=torch.int32)
    parts = [
        attention_received(query[:, :, start:end], key[:, :, start:end], 0.4)
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        if end > start
    ]
    for chunk in (1, 4, 256):
        found = attention_received(query, key, 0.4, segments=ends, chunk=chunk)
        assert float((found - torch.cat(parts, dim=1)).abs().max()) <= limits.attention


# --- the method that reads them
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("scope", ["item", "crop"])
def test_vtc_cls_keeps_the_tokens_whose_patches_receive_most(
    name: str, kind: str, scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, LAYOUTS[kind], model=model)
    eager = eager_weights(name, inputs, monkeypatch)["vision"]
    method = VTCCLS(layers=2, scope=scope)
    window = method.window(adapters.of(model).spec)
    assert window == ((1, 3) if name == "qwen2.5-vl" else (2, 3))
    grids = grids_of(inputs, kind)
    layers = [by_token(model, eager[layer], grids) for layer in window]
    with vtc.compress(model, method, retention=0.25) as handle:
        assert handle.positions == "preserve"
        generate(model, inputs, handle, 1)
    for item, grid, *rows in zip(handle.trace[0].items, grids, *layers, strict=True):
        scores = torch.stack(rows).sum(0)
        assert item.grid == (grid[0], grid[1] // MERGE, grid[2] // MERGE)
        if scope == "item":
            count = torch.tensor([(len(scores) + 2) // 4])  # a quarter, rounded half up
            expected = top_k(scores[None], count)[0].nonzero().flatten()
            assert torch.equal(item.kept[0], expected)
        else:
            frame = item.kept[0] // (len(scores) // grid[0])
            assert frame.bincount(minlength=grid[0]).float().std(correction=0) < 1
            for number in range(grid[0]):
                own = scores.view(grid[0], -1)[number]
                mine = item.kept[0][frame == number] - number * len(own)
                assert torch.equal(mine, top_k(own[None], torch.tensor([len(mine)]))[0].nonzero().flatten())
