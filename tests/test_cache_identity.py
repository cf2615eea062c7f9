"""A cache knows what filled it, and no forward pass leaves one open, however it ends."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vtc
from vtc.engine.cache import CompressedCache
from vtc.errors import UnsupportedCall
from vtc.testing import FixedKeep, tiny_inputs

PAIR = [[3, "image", 5], [2, "image", 9]]
NEXT = torch.full((2, 3), 7)


@torch.no_grad()
def _prefill(model: Any, method: Any, **options: Any) -> Any:
    with vtc.compress(model, method, **options):
        return model(**tiny_inputs("llava-clip", PAIR), past_key_values=DynamicCache()).past_key_values


@torch.no_grad()
def _go_on(model: Any, cache: Any, method: Any, **options: Any) -> torch.Tensor:
    with vtc.compress(model, method, **options):
        return model(input_ids=NEXT, past_key_values=cache).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "second",
    [
        ("random", {"retention": 0.5, "positions": "preserve"}),
        ("random", {"retention": 0.25}),
        ("random", {"keep": 4}),
        ("random", {"retention": 0.5, "seed": 1}),
        ("vtc_cls", {"retention": 0.5}),
        (["random"], {"retention": [0.5]}),
    ],
)
def test_another_maker_is_refused_and_named(clip: Any, second: Any) -> None:
    cache = _prefill(clip, "random", retention=0.5)
    with pytest.raises(UnsupportedCall, match=r"filled by Random\(.*retention=0.5.*start a new cache"):
        _go_on(clip, cache, second[0], **second[1])
    assert _go_on(clip, cache, "random", retention=0.5).shape[1] == 3  # the refusal left it as it was


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("random", {"retention": 0.5}),
        (["random", "fastv"], {"retention": [0.5, None]}),
        (FixedKeep(at=(0, 2), seed=3), {}),
        ("atp", {"weights": "atp-tiny-llava"}),
    ],
)
def test_equal_settings_go_on_with_a_fresh_handle_and_a_copy(clip: Any, method: Any, options: Any) -> None:
    try:
        cache = _prefill(clip, method, **options)
    except vtc.VTCError as refused:
        pytest.skip(str(refused))
    logits = _go_on(clip, copy.deepcopy(cache), method, **options)
    assert torch.equal(logits, _go_on(clip, cache, method, **options))


def test_an_emptied_cache_takes_any_method(clip: Any) -> None:
    cache = _prefill(clip, "random", retention=0.5)
    cache.reset()
    with vtc.compress(clip, FixedKeep(at=(0, 2))), torch.no_grad():
        clip(**tiny_inputs("llava-clip", PAIR), past_key_values=cache)
    assert cache.starts == (0, 2)


# --- ends of a forward pass
def _raise(kind: type[BaseException]) -> Any:
    def hook(*args: Any) -> None:
        raise kind("planned")

    return hook


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_an_exception_restores_the_cache(clip: Any, filled: bool, at: int) -> None:
    method = FixedKeep(at=(0, 2))
    cache: Any = _prefill(clip, method) if filled else DynamicCache()
    given: Any = {"input_ids": NEXT} if filled else tiny_inputs("llava-clip", PAIR)
    with vtc.compress(clip, method), torch.no_grad():
        expected = clip(**given, past_key_values=copy.deepcopy(cache)).logits
        hook = clip.model.language_model.layers[at].register_forward_hook(_raise(RuntimeError))
        with pytest.raises(RuntimeError, match="planned"):
            clip(**given, past_key_values=cache)
        hook.remove()
        assert isinstance(cache, CompressedCache) == filled
        assert torch.equal(clip(**given, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("filled", [False, True])
def test_an_interrupted_cache_refuses_everything(clip: Any, kind: type[BaseException], filled: bool) -> None:
    method = FixedKeep(at=(0, 2))
    cache: Any = _prefill(clip, method) if filled else DynamicCache()
    given: Any = {"input_ids": NEXT} if filled else tiny_inputs("llava-clip", PAIR)
    hook = clip.model.language_model.layers[1].register_forward_hook(_raise(kind))
    with pytest.raises(kind), vtc.compress(clip, method), torch.no_grad():
        clip(**given, past_key_values=cache)
    hook.remove()
    assert not cache.open
    with pytest.raises(UnsupportedCall, match="was interrupted"):
        clip(input_ids=NEXT, past_key_values=cache)
    with vtc.compress(clip, method), torch.no_grad():
        with pytest.raises(UnsupportedCall, match="was interrupted"):
            clip(input_ids=NEXT, past_key_values=cache)
        cache.reset()
        clip(**tiny_inputs("llava-clip", PAIR), past_key_values=cache)
    assert cache.get_seq_length() > 3


def test_the_next_call_closes_an_interrupted_one(clip: Any) -> None:
    cache, inputs = DynamicCache(), tiny_inputs("llava-clip", PAIR)
    with vtc.compress(clip, FixedKeep()), torch.no_grad():
        hook = clip.model.language_model.layers[1].register_forward_hook(_raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            clip(**inputs, past_key_values=cache)
        hook.remove()
        clip(**inputs)
        assert (cache.open, cache.broken) == (False, True)  # type: ignore[attr-defined]


def test_detaching_inside_a_forward_pass(clip: Any) -> None:
    handle, cache = vtc.compress(clip, FixedKeep()), DynamicCache()
    hook = clip.model.language_model.layers[2].register_forward_pre_hook(lambda *args: handle.detach())
    with torch.no_grad(), pytest.raises(UnsupportedCall, match="was interrupted"):
        clip(**tiny_inputs("llava-clip", PAIR), past_key_values=cache)
    hook.remove()
    assert not cache.open  # type: ignore[attr-defined]
    with torch.no_grad(), pytest.raises(UnsupportedCall, match="was interrupted"):
        clip(input_ids=NEXT, past_key_values=cache)


# --- blocks of one handle
def test_a_block_inside_a_block_of_the_same_handle_ends_nothing(clip: Any) -> None:
    inputs = tiny_inputs("llava-clip", PAIR)
    with torch.no_grad():
        for handle in [vtc.compress(clip, "random", retention=0.5)]:
            with handle:
                with handle:
                    inner = clip(**inputs).logits
                assert torch.equal(clip(**inputs).logits, inner)
                assert inner.shape[1] < inputs["input_ids"].shape[1]
            assert clip(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
            with pytest.raises(vtc.VTCError, match="was detached"), handle:
                pass
