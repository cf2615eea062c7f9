"""What is easy to get wrong inside transformers, one ablation per guard: with the guard exact, without it far off.

Where a guard replaces an argument of a module, the ablation puts back what the module was given: a hook registered
before the engine's remembers it, one registered after the engine's restores it. Without an engine both do nothing, so
the oracle is not touched.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    MistralConfig,
    Qwen2Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
import vtc.batch.items
import vtc.engine.engine
import vtc.engine.masks
from vtc import adapters
from vtc.adapters.base import Adapter
from vtc.adapters.compat import EXPANDS_IN_ORDER
from vtc.engine.cache import CompressedCache
from vtc.engine.encoder import VisionRecorder
from vtc.engine.llm_pass import LLMPass
from vtc.errors import UnsupportedCall, UnsupportedModel
from vtc.method.base import Compressor
from vtc.testing import FixedKeep, LastRowTopK, tiny_inputs
from vtc.testing.contract import against_oracle, generate, reference

Attach = Callable[[Any], vtc.Handle]
NAME = "llava-clip"
MIXED = [[4, "image", 3, "image", 5], [2, "image", 12], [9]]
PAIR = [[3, "image", 5], [2, "image", 9]]
STEPS = 6
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}

encodes_first = pytest.mark.skipif(not EXPANDS_IN_ORDER, reason="generate() encodes inside forward before 5.20")


def attaching(method: Compressor, **options: Any) -> Attach:
    return lambda model: vtc.compress(model, method, **options)


def restoring(
    key: str,
    modules: Callable[[Adapter], Sequence[nn.Module]],
    method: Compressor,
    when: Callable[[Tensor, Any], bool] = lambda hidden, given: True,
    **options: Any,
) -> Attach:
    """Attach `method`, but hand the modules the argument `key` they would get without an engine.

    when: decides by the hidden states a module now gets and the value it was given.
    """

    def attach(model: Any) -> vtc.Handle:
        given: dict[nn.Module, Any] = {}
        targets = modules(adapters.of(model))

        def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given[module] = kwargs.get(key)

        def restore(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("inputs_embeds"))
            return (args, {**kwargs, key: given[module]}) if when(hidden, given[module]) else None

        for module in targets:
            module.register_forward_pre_hook(remember, with_kwargs=True)
        handle = vtc.compress(model, method, **options)
        for module in targets:
            module.register_forward_pre_hook(restore, with_kwargs=True)
        return handle

    return attach


def language_model(adapter: Adapter) -> list[nn.Module]:
    return [adapter.language_model]


def later_layers(adapter: Adapter) -> list[nn.Module]:
    return list(adapter.layers[2:])


def worst(model: Any, attach: Attach, layout: Any = MIXED, **mode: Any) -> float:
    """Deviation from the oracle over a greedy generate() of a left-padded batch."""
    return against_oracle(model, tiny_inputs(NAME, layout, seed=3, extra=1), attach, STEPS, **mode)


def two_turns(model: Any, attach: Attach) -> float:
    """Deviation from the oracle over two generate() calls on one cache; the second sends the whole conversation."""
    inputs = tiny_inputs(NAME, PAIR, seed=2, extra=1)

    def turns(manager: Any) -> Tensor:
        cache = DynamicCache(config=model.config.get_text_config())
        with manager:
            ids, first = generate(model, inputs, nullcontext(), 4, past_key_values=cache)
            ids = torch.cat([ids, torch.full((2, 6), 7)], dim=1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 10, dtype=torch.long)], dim=1)
            more = {"input_ids": ids, "attention_mask": mask}
            _, second = generate(model, more, nullcontext(), 4, past_key_values=cache)
        return torch.cat([first, second])

    handle = attach(model)
    logits = turns(handle)
    return float((logits - turns(reference(model, handle))).abs().max())


def full_batch() -> dict[str, Tensor]:
    """Two prompts of one length: nothing is padded."""
    return tiny_inputs(NAME, [[4, "image", 5], [6, "image", 3]], seed=1)


# --- lengths: generate() asks the cache for logical tokens, masks need physical rows
def test_cache_length_is_logical(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = FixedKeep(at=(0, 2))
    assert two_turns(clip, attaching(probe)) <= limits.logits
    physical = lambda cache, layer_idx=0: cache.physical_length(layer_idx)  # noqa: E731
    monkeypatch.setattr(CompressedCache, "get_seq_length", physical)
    assert worst(clip, attaching(probe)) <= limits.logits  # generate() carries the positions of the first turn itself
    assert two_turns(clip, attaching(probe)) > limits.broken


def test_query_offset_is_physical(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = FixedKeep(at=(0, 2))
    assert worst(clip, attaching(probe)) <= limits.logits
    monkeypatch.setattr(CompressedCache, "get_query_offset", lambda cache, layer_idx=0: cache.seen)
    assert worst(clip, attaching(probe)) > limits.broken
    assert two_turns(clip, attaching(probe)) > limits.broken


def forget_seen(cache: CompressedCache, count: int) -> None:
    super(CompressedCache, cache).crop(count)
    cache.masks = {group: None if mask is None else mask[:, :count] for group, mask in cache.masks.items()}


def forget_masks(cache: CompressedCache, count: int) -> None:
    super(CompressedCache, cache).crop(count)
    cache.seen += count


@pytest.mark.parametrize("crop", [forget_seen, forget_masks])
def test_rejected_drafts_are_forgotten(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch, crop: Any) -> None:
    inputs = tiny_inputs(NAME, [[3, "image", 5]], seed=1)
    # Every token occurs in the prompt, so each step drafts the words behind it; the padding makes masks necessary.
    words = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.arange(5, 110)[None]], dim=1)
    inputs["input_ids"] = torch.cat([words, inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) >= 3).long()[None]
    options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    attach = attaching(FixedKeep(at=(0, 2)))
    assert against_oracle(clip, inputs, attach, STEPS, **options) <= limits.logits
    monkeypatch.setattr(CompressedCache, "crop", crop)
    with pytest.raises(RuntimeError, match="must match the size"):
        against_oracle(clip, inputs, attach, STEPS, **options)


# --- masks
@pytest.mark.parametrize("stages", [(0,), (0, 2)])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_decoding_does_not_use_the_growing_mask(
    clip: Any, limits: Any, stages: tuple[int, ...], positions: str
) -> None:
    probe = FixedKeep(at=stages)
    assert worst(clip, attaching(probe, positions=positions)) <= limits.logits
    decoding = lambda hidden, mask: hidden.shape[1] == 1  # noqa: E731
    broken = restoring("attention_mask", language_model, probe, decoding, positions=positions)
    assert worst(clip, broken) > limits.broken


def test_generate_hides_a_mask_of_ones_that_ragged_pruning_needs(clip: Any, limits: Any) -> None:
    given: list[Any] = []
    adapters.of(clip).language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    probe = FixedKeep(at=(0,), static=False)
    assert against_oracle(clip, full_batch(), attaching(probe), STEPS) <= limits.logits
    if given[0] is not None:
        pytest.skip("this version of transformers hands the mask over")
    assert against_oracle(clip, full_batch(), restoring("attention_mask", language_model, probe), STEPS) > limits.broken


def without_cache(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    with attach(model) as handle, torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, -1]
    with reference(model, handle), torch.no_grad():
        return float((logits - model(**inputs, use_cache=False).logits[:, -1]).abs().max())


def test_gapped_positions_without_cache_and_mask_are_not_packed_sequences(clip: Any, limits: Any) -> None:
    inputs = {k: v for k, v in tiny_inputs(NAME, PAIR[:1]).items() if k != "attention_mask"}
    probe = FixedKeep(at=(0,))
    assert without_cache(clip, inputs, attaching(probe)) <= limits.logits
    assert without_cache(clip, inputs, restoring("attention_mask", language_model, probe)) > limits.broken


# --- layer groups
@pytest.mark.parametrize("key", ["attention_mask", "position_embeddings"])
def test_later_layers_get_masks_and_phases_of_their_own(clip: Any, limits: Any, key: str) -> None:
    probe = FixedKeep(at=(0, 2))
    assert worst(clip, attaching(probe)) <= limits.logits
    with pytest.raises(RuntimeError, match="must match the size"):
        worst(clip, restoring(key, later_layers, probe))


def test_phases_move_even_where_the_length_stays(clip: Any, limits: Any) -> None:
    inputs, probe = tiny_inputs(NAME, [[2, "image", 3], [40]], seed=3), FixedKeep(at=(2,))
    assert against_oracle(clip, inputs, attaching(probe), STEPS) <= limits.logits
    same_length = lambda hidden, phases: phases[0].shape[1] == hidden.shape[1]  # noqa: E731
    broken = restoring("position_embeddings", later_layers, probe, same_length)
    assert against_oracle(clip, inputs, broken, STEPS) > limits.broken


def test_masks_are_built_for_the_layer_they_serve(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, build = FixedKeep(at=(0, 2)), vtc.engine.masks.create_causal_mask
    assert worst(clip, attaching(probe)) <= limits.logits
    monkeypatch.setattr(vtc.engine.masks, "create_causal_mask", lambda **given: build(**{**given, "layer_idx": 0}))
    with pytest.raises(RuntimeError, match="must match the size"):
        worst(clip, attaching(probe))


def test_later_tokens_follow_the_renumbered_prompt(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = FixedKeep(at=(0, 2))
    assert worst(clip, attaching(probe, positions="compact")) <= limits.logits
    number = LLMPass._positions

    def forgetful(call: LLMPass, group: int) -> Tensor:
        if call.cache is not None:
            call.cache.shifts[group] = None
        return number(call, group)

    monkeypatch.setattr(LLMPass, "_positions", forgetful)
    assert worst(clip, attaching(probe, positions="compact")) > limits.broken


# --- flash attention reads position ids again, layer by layer
@dataclass
class EmulatedFlash:
    """FlashAttention-2 as transformers drives it: 2D masks, and packed sequences found by their position ids."""

    packed: int = 0

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **kwargs: Any
    ) -> Any:
        batch, heads, queries, _ = query.shape
        keys = key.shape[2]
        seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
        if module.is_causal:
            seen &= torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        if mask is not None:
            assert mask.shape == (batch, keys)
            seen &= mask[:, None, None].bool()
        elif flash._is_packed_sequence(kwargs.get("position_ids"), batch):
            self.packed += 1
            (bounds, _), _ = flash.prepare_fa_kwargs_from_position_ids(kwargs["position_ids"])
            segment = torch.bucketize(torch.arange(keys), bounds[1:].long(), right=True)
            inside = segment[:queries, None] == segment[None]
            seen = inside & (torch.arange(keys) <= torch.arange(queries)[:, None])
        groups = heads // key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), seen, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], EmulatedFlash]:
    """Switch a model to the emulated kernel."""

    def switch(model: Any) -> EmulatedFlash:
        kernel = EmulatedFlash()
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", kernel)
        for module in model.modules():
            if hasattr(module, "config"):
                monkeypatch.setattr(module.config, "_attn_implementation_internal", "flash_attention_2")
        return kernel

    return switch


def test_flash_attention_never_sees_gapped_position_ids(
    clip: Any, limits: Any, run_chunks: Any, flash_kernel: Any
) -> None:
    chunks = [tiny_inputs(NAME, [[3, "image", 5]], seed=seed) for seed in (1, 2)]
    probe = FixedKeep(at=(0,))
    with vtc.compress(clip, probe) as handle:
        exact = run_chunks(clip, chunks, handle)
    kernel = flash_kernel(clip)
    logits = run_chunks(clip, chunks, vtc.compress(clip, probe))
    assert float((logits - exact).abs().max()) <= limits.logits
    assert kernel.packed == 0
    every_layer = lambda adapter: adapter.layers  # noqa: E731
    logits = run_chunks(clip, chunks, restoring("position_ids", every_layer, probe)(clip))
    assert float((logits - exact).abs().max()) > limits.broken
    assert kernel.packed > 0


@pytest.mark.parametrize("probe", [FixedKeep(at=(0, 2)), LastRowTopK(), vtc.create("vtc_cls")], ids=lambda m: m.name)
@pytest.mark.parametrize("layout", [PAIR, PAIR[:1]], ids=["padded", "single"])
def test_flash_attention_gives_the_same_answers(
    clip: Any, limits: Any, flash_kernel: Any, probe: Any, layout: Any
) -> None:
    inputs = tiny_inputs(NAME, layout, extra=len(layout) - 1)
    budget = {"retention": 0.7} if probe.needs_budget else {}
    exact = generate(clip, inputs, first := vtc.compress(clip, probe, **budget), STEPS)
    flash_kernel(clip)
    found = generate(clip, inputs, second := vtc.compress(clip, probe, **budget), STEPS)
    assert torch.equal(found[0], exact[0])
    assert float((found[1] - exact[1]).abs().max()) <= limits.logits
    for stage, keep in first.trace[0].keep.items():
        assert torch.equal(second.trace[0].keep[stage], keep)


# --- where the images are encoded
@encodes_first
def test_generate_encodes_outside_forward(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels: list[bool] = []
    signature = inspect.signature(type(clip.model).forward)

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        pixels.append(signature.bind_partial(module, *args, **kwargs).arguments.get("pixel_values") is not None)

    clip.model.register_forward_pre_hook(look, with_kwargs=True)
    assert worst(clip, attaching(FixedKeep())) <= limits.logits
    assert not any(pixels)
    plain = lambda recorder, kind, function: functools.wraps(function)(lambda *args, **kw: function(*args, **kw))  # noqa: E731
    monkeypatch.setattr(VisionRecorder, "_wrap", plain)
    with pytest.raises(UnsupportedCall, match="encoded without the attached method"):
        worst(clip, attaching(FixedKeep()))


@encodes_first
def test_beams_share_one_encoding_in_order(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clip.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(1))
    inputs = tiny_inputs(NAME, MIXED, seed=3)

    def kept(**mode: Any) -> Tensor:
        with vtc.compress(clip, "random", retention=0.5) as handle:
            generate(clip, inputs, nullcontext(), 3, **mode)
        return handle.trace[0].keep[0]

    alone = kept()
    calls.clear()
    assert torch.equal(kept(num_beams=3), alone.repeat_interleave(3, 0))
    assert len(calls) == 1
    build = vtc.batch.items.build

    def in_turns(*args: Any, **kwargs: Any) -> Any:
        table, separators = build(*args, **kwargs)
        return dataclasses.replace(table, source=torch.arange(len(table)) % 3), separators

    monkeypatch.setattr(vtc.batch.items, "build", in_turns)
    assert not torch.equal(kept(num_beams=3), alone.repeat_interleave(3, 0))


class Force(LogitsProcessor):
    """Generate these tokens, whatever the model says."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor(self.tokens.pop(0)), 0.0)


def test_a_generated_placeholder_is_text(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs(NAME, MIXED, seed=3, extra=1)

    def run(manager: Any) -> Tensor:
        with manager, torch.no_grad():
            output = clip.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                logits_processor=[Force(7, clip.config.image_token_id, 8, 9)],
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert (output.sequences[:, -3] == clip.config.image_token_id).all()
        return torch.stack(output.logits)

    handle = vtc.compress(clip, FixedKeep(at=(0, 2)))
    logits = run(handle)
    assert float((logits - run(reference(clip, handle))).abs().max()) <= limits.logits
    monkeypatch.setattr(vtc.engine.engine, "carries_media", lambda given: True)
    with pytest.raises(UnsupportedCall, match="visual tokens of a row lie outside the prompt"):
        run(vtc.compress(clip, FixedKeep(at=(0, 2))))


def test_feature_outputs_are_counted_not_trusted(clip: Any, limits: Any) -> None:
    encode = clip.model.get_image_features

    @functools.wraps(encode)
    def one_block(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        output.pooler_output = [torch.cat(list(output.pooler_output))]
        return output

    clip.model.get_image_features = one_block
    with torch.no_grad():
        output = clip.model.get_image_features(tiny_inputs(NAME, PAIR)["pixel_values"])
    assert len(output.pooler_output) == 1  # two images
    inputs = tiny_inputs(NAME, PAIR)
    with vtc.compress(clip, FixedKeep()) as handle, torch.no_grad():
        clip(**inputs)
    assert [len(item.positions) for item in handle.trace[0].items] == [16, 16]


# --- what is refused, and when
def sliding_model(text: Any) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=7), text_config=text, image_token_index=120
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "text",
    [
        MistralConfig(sliding_window=8, **SMALL),
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0, **SMALL),
    ],
    ids=["mistral", "qwen2"],
)
def test_sliding_windows_are_refused_before_the_first_token(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sliding_model(text), tiny_inputs(NAME, PAIR)
    with pytest.raises(UnsupportedModel, match=r"sliding_window=8.*Load the checkpoint with sliding_window=None"):
        vtc.compress(model, FixedKeep())
    monkeypatch.setattr(Adapter, "check", lambda adapter: None)
    with vtc.compress(model, FixedKeep()), pytest.raises(UnsupportedCall, match="full-attention layers"):
        model(**inputs)


@pytest.mark.parametrize(
    "text",
    [MistralConfig(sliding_window=None, **SMALL), Qwen2Config(use_sliding_window=False, sliding_window=8, **SMALL)],
    ids=["mistral", "qwen2"],
)
def test_models_that_could_slide_but_do_not_are_served(text: Any, limits: Any) -> None:
    model, inputs = sliding_model(text), tiny_inputs(NAME, PAIR)
    with vtc.compress(model, FixedKeep(at=(0, 1))) as handle, torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    with reference(model, handle), torch.no_grad():
        assert float((logits - model(**inputs).logits[:, -1]).abs().max()) <= limits.logits


def test_hidden_states_have_the_length_of_their_layer(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    length = inputs["input_ids"].shape[1]
    with vtc.compress(clip, FixedKeep(at=(2,))), torch.no_grad():
        hidden = clip(**inputs, output_hidden_states=True).hidden_states
    assert [states.shape[1] for states in hidden] == [length] * 3 + [length - 8] * 2


# --- state that must outlive a call
def test_a_compressed_cache_works_with_its_engine_only(clip: Any, limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny_inputs(NAME, PAIR)

    def prefill() -> Any:
        with vtc.compress(clip, FixedKeep(at=(0, 2)), positions="compact"), torch.no_grad():
            return clip(**inputs, use_cache=True).past_key_values

    def decode(cache: Any, manager: Any) -> Tensor:
        with manager, torch.no_grad():
            return clip(input_ids=torch.tensor([[7], [7]]), past_key_values=cache, use_cache=True).logits

    exact = decode(prefill(), vtc.compress(clip, FixedKeep(at=(0, 2)), positions="compact"))
    with pytest.raises(UnsupportedCall, match="attach the same method again"):
        decode(prefill(), nullcontext())
    monkeypatch.setattr(CompressedCache, "update", DynamicCache.update)
    assert float((decode(prefill(), nullcontext()) - exact).abs().max()) > limits.broken
