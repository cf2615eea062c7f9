"""Visual tokens of each layer and of each cache, and rows inside the encoder, as the statistics of a call tell them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from vtc import adapters
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.everything import runs, small
from vtc.testing.pairs import with_tiny_pair

LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12]]
METHODS = [name for name in vtc.list_methods(trained=False)]


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("registered", METHODS)
def test_counts_are_those_of_the_cache(registered: str, name: str) -> None:
    """Row by row: text and visual tokens that are left are the rows of each layer's cache, padding apart."""
    model, method = tiny_model(name), small(registered)
    if not runs(method, adapters.of(model).spec):
        pytest.skip("does not run on this family")
    method, told = with_tiny_pair(method, name)
    budget = {"retention": 0.7} if method.needs_budget else {}
    for row in range(len(LAYOUT)):
        inputs = tiny_inputs(name, LAYOUT, only=row, model=model)
        with vtc.compress(model, method, **budget, **told) as handle, torch.no_grad():
            cache = model(**inputs).past_key_values
        (call,) = handle.stats.calls
        (total,) = call.visual_tokens_in
        text = inputs["input_ids"].shape[1] - total
        entering = [tokens for layers, (tokens,) in call.entering for _ in range(layers)]
        left = [tokens for layers, (tokens,) in call.left for _ in range(layers)]
        assert [text + tokens for tokens in left] == [layer.keys.shape[2] for layer in cache.layers]
        assert [text + tokens for tokens in entering] == list(call.layer_rows)
        assert sum(entering) / len(entering) == pytest.approx(call.visual_tokens_kept[0])
        assert (left == entering) == (call.kv_rows == call.layer_rows)


def test_batches_tell_rows_apart() -> None:
    model = tiny_model("llava-clip")
    with vtc.compress(model, "mustdrop", retention=0.7) as handle, torch.no_grad():
        model(**tiny_inputs("llava-clip", LAYOUT, model=model))
    (call,) = handle.stats.calls
    for row, tokens in enumerate(call.visual_tokens_in):
        entering = [(layers, totals[row]) for layers, totals in call.entering]
        assert entering[0][1] <= tokens
        assert sum(n * count for n, count in entering) / 4 == pytest.approx(call.visual_tokens_kept[row])
    assert [layers for layers, _ in call.left] == [layers for layers, _ in call.entering]
    assert sum(call.left[0][1]) <= sum(call.entering[0][1])


@pytest.mark.parametrize("registered", vtc.list_methods(stage="encoder", family="llava", trained=False))
def test_rows_inside_the_encoder(registered: str) -> None:
    model, method = tiny_model("llava-clip"), small(registered)
    budget = {"retention": 0.7} if method.needs_budget else {}
    with vtc.compress(model, method, **budget) as handle, torch.no_grad():  # type: ignore[arg-type]
        model(**tiny_inputs("llava-clip", [[3, "image", 5]], model=model))
    rows = handle.stats.calls[0].encoder_rows
    assert [layer for layer, _ in rows] == sorted({layer for layer, _ in rows}) != []
    assert all(0 < count <= 17 for _, count in rows)
