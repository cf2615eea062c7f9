"""Copies, pickles and state of an attached model, and what keeps it alive."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import UnsupportedCall, VTCError
from vtc.testing import FixedKeep, tiny_inputs, tiny_model

PAIR = [[3, "image", 5], [2, "image", 9]]


@pytest.mark.parametrize("method", ["vtc_cls", "fastv", "mustdrop"])
def test_a_deep_copy_is_a_plain_model(clip: Any, method: str) -> None:
    inputs = tiny_inputs("llava-clip", PAIR)
    with torch.no_grad():
        expected = clip(**inputs).logits
        with vtc.compress(clip, method, retention=0.7) as handle:
            compressed = clip(**inputs).logits
            made, part = copy.deepcopy(clip), copy.deepcopy(clip.model.language_model)
            calls = len(handle.stats.calls)
            assert torch.equal(made(**inputs).logits, expected)
            assert len(handle.stats.calls) == calls
            assert not part._forward_pre_hooks
            with vtc.compress(made, method, retention=0.7):
                assert torch.equal(made(**inputs).logits, compressed)
            assert torch.equal(clip(**inputs).logits, compressed)
        assert torch.equal(made(**inputs).logits, expected)
    ours = [key for module in made.modules() for key in vars(module) if "vtc" in key or key.startswith("__")]
    assert ours == []
    assert {"generate", "generate_batch", "get_image_features"}.isdisjoint({*vars(made), *vars(made.model)})


def test_a_pickle_is_refused_and_the_state_is_the_same(clip: Any) -> None:
    before = clip.state_dict()
    with vtc.compress(clip, "vtc_cls", retention=0.5):
        with pytest.raises(VTCError, match="state_dict"):
            torch.save(clip, io.BytesIO())
        with pytest.raises(VTCError, match="copied shallowly"):
            copy.copy(clip.model)
        inside = clip.state_dict()
    assert inside.keys() == before.keys()
    assert all(torch.equal(inside[key], before[key]) for key in before)
    torch.save(tiny_model("llava-clip"), io.BytesIO())


@pytest.mark.parametrize("method", ["vtc_cls", "fastv"])
@pytest.mark.parametrize("run", [False, True])
def test_a_model_dropped_while_attached_is_freed(method: str, run: bool) -> None:
    model = tiny_model("llava-clip")
    handle = vtc.compress(model, method, retention=0.7)
    if run:
        with torch.no_grad():
            model(**tiny_inputs("llava-clip", PAIR))
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
    assert not vtc.engine.taps._taps
    assert not vtc.engine.taps._users


def test_errors_keep_no_tensors(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", PAIR)
    with vtc.compress(clip, FixedKeep()) as handle:
        for _ in range(120):
            with pytest.raises(UnsupportedCall):
                clip(**inputs, labels=inputs["input_ids"])
    assert len(handle.errors) == 100
    assert all(isinstance(error, UnsupportedCall) and "pad_output=True" in str(error) for error in handle.errors)
    assert all(error.__traceback__ is None and error.__context__ is None for error in handle.errors)
