"""The engine from outside: attach and detach, what is refused, every way of running a model, two models at once."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtc
from vtc.adapters.compat import EXPANDS_IN_ORDER, repeats_hooks
from vtc.engine import taps
from vtc.errors import UnsupportedCall, UnsupportedModel, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.testing import FixedKeep, LastRowTopK, Oracle, snapshot, tiny_inputs, tiny_model
from vtc.testing.contract import MODES, against_oracle, generate, reference

NAME = "llava-clip"
PAIR, LENGTH = [[3, "image", 5], [2, "image", 9]], 27
EVEN = [[3, "image", 5], [2, "image", 6]]
INNER = FixedKeep(at=(0, 2))

encodes_first = pytest.mark.skipif(not EXPANDS_IN_ORDER, reason="generate() encodes inside forward before 5.20")


@dataclass(frozen=True)
class Fails(Compressor):
    """Reads every kind of attention and raises at its stage inside the LLM, as often as `times` says."""

    times: int = 10**9
    seen: list[int] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "fails"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((0, 2), Needs({1: Rows.CLS}, {1: Rows.LAST}), "preserve")

    def select(self, view: StageView) -> Selection | None:
        if view.stage == 2 and len(self.seen) < self.times:
            self.seen.append(1)
            raise ZeroDivisionError("planned")
        return None


def prefill(model: Any, manager: Any, **inputs: Any) -> Any:
    with manager, torch.no_grad():
        return model(**(inputs or tiny_inputs(NAME, PAIR)), use_cache=True)


def rows(model: Any) -> int:
    """Rows that the first layer's cache holds after a prefill of PAIR."""
    return int(prefill(model, nullcontext()).past_key_values.layers[0].keys.shape[2])


# --- life cycle
def test_a_second_method_is_refused_until_the_first_is_gone(clip: Any) -> None:
    assert rows(clip) == LENGTH
    before = snapshot(clip)
    with vtc.compress(clip, "vtc_cls", retention=0.5) as first:
        with pytest.raises(VTCError, match="already has a method attached; detach it first"):
            vtc.compress(clip, "random", retention=0.25)
        assert rows(clip) == LENGTH - 8  # the first still acts
        first.detach()
        with vtc.compress(clip, "random", retention=0.25):
            assert rows(clip) == LENGTH - 12
    assert snapshot(clip) == before


def test_detaching_twice_is_harmless_even_when_another_method_came(clip: Any) -> None:
    first = vtc.compress(clip, "vtc_cls", retention=0.5)
    first.detach()
    first.detach()
    with vtc.compress(clip, "vtc_cls", retention=0.25) as second:
        first.detach()
        assert rows(clip) == LENGTH - 12
        second.detach()
        assert rows(clip) == LENGTH


def test_a_handle_works_as_a_block_and_by_hand(clip: Any) -> None:
    with vtc.compress(clip, INNER) as handle:
        assert isinstance(handle, vtc.Handle)
        inside = prefill(clip, nullcontext()).logits[:, -1]
    handle = vtc.compress(clip, INNER)
    assert torch.equal(prefill(clip, nullcontext()).logits[:, -1], inside)
    handle.detach()
    assert repr(handle).startswith("Handle(FixedKeep(at=(0, 2)")
    assert (handle.method, handle.budget, handle.positions, handle.plan.stages) == (INNER, None, "preserve", (0, 2))


def test_a_detached_handle_opens_no_block(clip: Any) -> None:
    """It would measure the untouched model under the method's name."""
    with vtc.compress(clip, INNER) as handle:
        pass
    with pytest.raises(VTCError, match=r"this handle was detached.*call vtc\.compress again"), handle:
        pass
    with vtc.compress(clip, INNER) as other, pytest.raises(VTCError, match="this handle was detached"), handle:
        pass
    assert not other.stats.calls


def test_nothing_is_left_behind(clip: Any) -> None:
    prefill(clip, nullcontext())
    before, registry = snapshot(clip), dict(ALL_ATTENTION_FUNCTIONS.items())
    handle = vtc.compress(clip, Fails(times=0))
    assert snapshot(clip) != before
    prefill(clip, handle)
    assert snapshot(clip) == before
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == registry
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in clip.model.language_model.layers)
    assert (taps._taps, taps._users, taps._saved) == ({}, {}, {})


def test_an_exception_in_the_method_leaves_nothing_behind(clip: Any) -> None:
    prefill(clip, nullcontext())
    before = snapshot(clip)
    handle = vtc.compress(clip, Fails())
    with pytest.raises(ZeroDivisionError, match="planned"):
        prefill(clip, handle)
    assert snapshot(clip) == before
    assert [type(error) for error in handle.errors] == [ZeroDivisionError]
    assert not handle.stats.calls
    assert (taps._taps, taps._users, taps._saved) == ({}, {}, {})


@pytest.mark.parametrize("turn", [0, 5])
def test_the_callers_cache_is_plain_again_after_an_exception(clip: Any, turn: int) -> None:
    """What a text turn left in it stays, what the failed prefill wrote goes; the untouched model goes on with it."""
    own, inputs = DynamicCache(config=clip.config.get_text_config()), tiny_inputs(NAME, PAIR)
    with torch.no_grad():
        if turn:
            clip(input_ids=torch.full((2, turn), 9), past_key_values=own)
        mask = torch.cat([torch.ones(2, turn, dtype=torch.long), inputs["attention_mask"]], dim=1)
        inputs["attention_mask"] = mask
        expected = clip(**inputs, past_key_values=copy.deepcopy(own)).logits
        with vtc.compress(clip, Fails()), pytest.raises(ZeroDivisionError):
            clip(**inputs, past_key_values=own)
        assert type(own) is DynamicCache
        assert own.get_seq_length() == turn
        assert torch.equal(clip(**inputs, past_key_values=own).logits, expected)


def test_an_attached_method_recovers_from_an_exception(clip: Any) -> None:
    plain = prefill(clip, nullcontext()).logits
    with vtc.compress(clip, Fails(times=1)) as handle:
        with pytest.raises(ZeroDivisionError):
            prefill(clip, nullcontext())
        assert torch.equal(prefill(clip, nullcontext()).logits[:, -1], plain[:, -1])
    assert len(handle.errors) == 1
    assert len(handle.stats.calls) == 1


def test_a_method_that_cannot_be_attached_leaves_nothing_behind(clip: Any) -> None:
    prefill(clip, nullcontext())
    before = snapshot(clip)
    for options in ({"method": FixedKeep(at=(4,))}, {"method": "vtc_cls", "retention": 2.0}):
        with pytest.raises(VTCError):
            vtc.compress(clip, **options)  # type: ignore[arg-type]
    assert snapshot(clip) == before
    eager = tiny_model(NAME, attn_implementation="eager")
    before = snapshot(eager)
    with pytest.raises(UnsupportedModel):
        vtc.compress(eager, LastRowTopK(), retention=0.7)
    assert snapshot(eager) == before


# --- caches
def test_a_compressed_cache_needs_its_method(clip: Any, limits: Any) -> None:
    step = {"input_ids": torch.tensor([[7], [8]])}
    cache = prefill(clip, vtc.compress(clip, INNER)).past_key_values
    with pytest.raises(UnsupportedCall, match="attach the same method again to continue it"):
        prefill(clip, nullcontext(), **step, past_key_values=cache)
    with pytest.raises(UnsupportedCall, match=r"compressed at layers \(0, 2\), the attached method acts at \(0,\)"):
        prefill(clip, vtc.compress(clip, FixedKeep(at=(0,))), **step, past_key_values=cache)
    assert cache.get_seq_length() == LENGTH  # refused calls leave it usable
    again = prefill(clip, vtc.compress(clip, INNER), **step, past_key_values=cache)
    with vtc.compress(clip, INNER):
        cache = prefill(clip, nullcontext()).past_key_values
        straight = prefill(clip, nullcontext(), **step, past_key_values=cache)
    assert torch.equal(again.logits, straight.logits)


class QuantizedLayer(DynamicLayer):
    """Stands for any layer that stores something else than plain rows."""


def offloaded() -> DynamicCache:
    cache = DynamicCache()
    cache.offloading = True
    return cache


def quantized() -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(QuantizedLayer())
    return cache


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        (lambda model: StaticCache(config=model.config.get_text_config(), max_cache_len=64), "StaticCache"),
        (lambda model: offloaded(), "DynamicCache"),
        (lambda model: quantized(), "QuantizedLayer"),
    ],
    ids=["static", "offloaded", "quantized"],
)
def test_caches_of_other_kinds_are_refused(clip: Any, cache: Any, named: str) -> None:
    with vtc.compress(clip, INNER) as handle:
        with pytest.raises(UnsupportedCall, match=f"{named}.*drop cache_implementation"):
            prefill(clip, nullcontext(), **tiny_inputs(NAME, PAIR), past_key_values=cache(clip))
        assert isinstance(handle.errors[0], UnsupportedCall)
        prefill(clip, nullcontext())
    assert len(handle.stats.calls) == 1


def test_generate_refuses_a_static_cache(clip: Any) -> None:
    with vtc.compress(clip, INNER), pytest.raises(UnsupportedCall, match=r"2D attention mask.*static caches"):
        clip.generate(**tiny_inputs(NAME, PAIR), max_new_tokens=2, cache_implementation="static")


def test_text_only_calls_may_use_any_cache(clip: Any) -> None:
    inputs = tiny_inputs(NAME, [[9], [9]])
    plain = clip.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
    with vtc.compress(clip, INNER) as handle:
        assert torch.equal(
            clip.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static"), plain
        )
    assert not handle.stats.calls


# --- refused arguments
def test_custom_masks_are_refused(clip: Any) -> None:
    inputs = tiny_inputs(NAME, EVEN)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(2, 1, length, length).tril().bool()
    with vtc.compress(clip, INNER), pytest.raises(UnsupportedCall, match="2D attention mask"):
        clip(**inputs)


@encodes_first  # older versions drop the images of a chunked prompt themselves
def test_chunked_prefill_is_refused(clip: Any) -> None:
    with vtc.compress(clip, INNER) as handle, pytest.raises(UnsupportedCall, match="chunked prefill"):
        clip.generate(**tiny_inputs(NAME, PAIR), max_new_tokens=2, do_sample=False, prefill_chunk_size=8)
    assert isinstance(handle.errors[-1], UnsupportedCall)


@encodes_first
def test_encoder_outputs_from_outside_are_refused(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        outside = clip.model.get_image_features(pixels, return_dict=True)
        with vtc.compress(clip, INNER):
            with pytest.raises(UnsupportedCall, match="encode them inside the `with` block"):
                clip(**inputs, mm_encoder_outputs={"image": outside})
            inside = clip.model.get_image_features(pixels, return_dict=True)
            logits = clip(**inputs, mm_encoder_outputs={"image": inside}).logits[:, -1]
            assert torch.equal(logits, clip(**inputs, pixel_values=pixels).logits[:, -1])


def test_prompts_that_cut_an_image_are_refused(clip: Any) -> None:
    """The model itself only counts: 8 + 24 placeholders are two images to it, whatever the rows say."""
    inputs = tiny_inputs(NAME, [[8, "image", 8], [8, "image", 8]])
    image = clip.config.image_token_id
    ids = inputs["input_ids"]
    ids[0, (ids[0] == image).nonzero()[8:, 0]] = 7
    ids[1, :8] = image
    prefill(clip, nullcontext(), **inputs)
    with vtc.compress(clip, INNER), pytest.raises(UnsupportedCall, match=r"8 image placeholders.*ends inside an item"):
        clip(**inputs)


def test_images_without_placeholders_and_placeholders_without_images(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    with vtc.compress(clip, INNER):
        with pytest.raises(ValueError, match="do not match"):  # the model's own check comes first
            clip(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
        text = {k: v for k, v in inputs.items() if k != "pixel_values"}
        with torch.no_grad(), pytest.raises(UnsupportedCall, match="placeholders but no pixels"):
            clip(**text)


# --- ways of running
@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("given", ["mask", "mask and ids", "ids", "nothing"])
@pytest.mark.parametrize("cache", ["own", "the model's", "none"])
def test_manual_loops(clip: Any, limits: Any, run_chunks: Any, positions: Any, given: str, cache: str) -> None:
    chunk = tiny_inputs(NAME, PAIR if "mask" in given else EVEN, seed=4)
    options = {"mask": "mask" in given, "positions": "ids" in given, "use_cache": cache != "none"}
    own = lambda: {"cache": DynamicCache(config=clip.config.get_text_config())} if cache == "own" else {}  # noqa: E731
    handle = vtc.compress(clip, INNER, positions=positions)
    logits = run_chunks(clip, [chunk], handle, **options, **own())
    expected = run_chunks(clip, [chunk], reference(clip, handle), **options, **own())
    assert float((logits - expected).abs().max()) <= limits.logits


@pytest.mark.parametrize("positions", ["preserve", "compact"])
@pytest.mark.parametrize("stages", [(0,), (2,), (0, 2), (0, 1, 3)])
def test_an_image_in_a_later_turn(
    clip: Any, limits: Any, run_chunks: Any, stages: tuple[int, ...], positions: Any
) -> None:
    first = tiny_inputs(NAME, PAIR, seed=1, extra=1)
    later = [tiny_inputs(NAME, [[4, "image", 6], [4, "image", 6]], seed=seed) for seed in (2, 3)]
    handle = vtc.compress(clip, FixedKeep(at=stages), positions=positions)
    logits = run_chunks(clip, [first, *later], handle)
    assert len(handle.trace) == 3
    tables = {stage: torch.cat([record.keep[stage] for record in handle.trace], dim=1) for stage in stages}
    expected = run_chunks(clip, [first, *later], Oracle(clip, tables, positions=positions))
    assert float((logits - expected).abs().max()) <= limits.logits


def test_embeddings_with_pixels(clip: Any, limits: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        inputs["inputs_embeds"] = clip.get_input_embeddings()(ids)
    handle = vtc.compress(clip, INNER)
    logits = prefill(clip, handle, **inputs).logits[:, -1]
    assert len(handle.stats.calls) == 1
    expected = prefill(clip, reference(clip, handle), **inputs).logits[:, -1]
    assert float((logits - expected).abs().max()) <= limits.logits


@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_prompt_lookup_decoding(clip: Any, limits: Any, positions: Any) -> None:
    inputs = tiny_inputs(NAME, [[40, "image", 5]], seed=1)
    inputs["input_ids"][0, 1:40] = 7 + torch.arange(39) % 5
    attach = lambda model: vtc.compress(model, INNER, positions=positions)  # noqa: E731
    assert against_oracle(clip, inputs, attach, 10, prompt_lookup_num_tokens=4) <= limits.logits


def test_positional_arguments(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR)
    by_keyword = prefill(clip, vtc.compress(clip, INNER), **inputs).logits[:, -1]
    with vtc.compress(clip, INNER) as handle, torch.no_grad():
        by_position = clip(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).logits[:, -1]
    assert len(handle.stats.calls) == 1
    assert torch.equal(by_position, by_keyword)


def test_tuple_outputs(clip: Any) -> None:
    named = prefill(clip, vtc.compress(clip, INNER), **tiny_inputs(NAME, PAIR)).logits[:, -1]
    with vtc.compress(clip, INNER), torch.no_grad():
        logits = clip(**tiny_inputs(NAME, PAIR), return_dict=False)[0]
    assert torch.equal(logits[:, -1], named)


def test_inference_mode_and_autocast_leave_the_choice_alone(clip: Any) -> None:
    handle = vtc.compress(clip, "vtc_cls", retention=0.5)
    with handle:
        prefill(clip, nullcontext())
        with torch.inference_mode():
            clip(**tiny_inputs(NAME, PAIR))
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            clip(**tiny_inputs(NAME, PAIR))
    kept = [record.keep[0] for record in handle.trace]
    assert torch.equal(kept[0], kept[1])
    assert kept[2].sum() == kept[0].sum()


# --- what a method sees and says
@dataclass(frozen=True)
class Watches(Compressor):
    """Keeps a ragged share at its first stages and everything at the last, and remembers its views."""

    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "watches"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((0, 2, 3), Needs(), "preserve")

    def select(self, view: StageView) -> Selection:
        self.views.append(view)
        limit = torch.tensor([[5], [11], [9]]) if view.stage == 0 else torch.tensor([[4], [9], [2]])
        if view.stage == 3:
            return Selection(torch.ones_like(view.items.mask))  # also behind the items' ends, which is ignored
        return Selection(view.items.token < limit, tokens=view.tokens * 2)


def test_views_of_every_stage(clip: Any, limits: Any) -> None:
    inputs = tiny_inputs(NAME, [[4, "image", 3, "image", 5], [2, "image", 12], [9]], extra=1)
    method = Watches()
    handle = vtc.compress(clip, method)
    with handle, torch.no_grad():
        clip(**inputs)
    assert [view.stage for view in method.views] == [0, 2, 3]
    counts = [(16, 16, 16), (5, 11, 9), (4, 9, 2)]
    for view, count in zip(method.views, counts, strict=True):
        items = view.items
        assert items.counts == count
        assert items.input_counts == (16, 16, 16)
        assert items.mask.sum(1).tolist() == list(count)
        assert torch.equal(items.token, torch.where(items.mask, torch.arange(max(count)), 0))
        assert bool((items.index[~items.mask] == 0).all())
        marked = torch.zeros_like(view.visual)
        for row, index, mask in zip(items.row, items.index, items.mask, strict=True):
            marked[row, index[mask]] = True
        assert torch.equal(view.visual & view.valid, marked)
        assert view.valid.sum(1).tolist() == [12 + count[0] + count[1], 14 + count[2], 9]
        assert view.tokens.shape == (3, max(count), 64)
        for item in range(3):
            assert torch.equal(view.tokens[item, 0], view.hidden[items.row[item], items.index[item, 0]])
    assert [tuple(len(item.kept[3]) for item in handle.trace[0].items)] == counts[2:]


# --- attention implementations
@pytest.mark.parametrize("mode", MODES)
def test_eager_attention_serves_methods_without_taps(limits: Any, mode: str) -> None:
    model = tiny_model(NAME, attn_implementation="eager")
    attach = lambda model: vtc.compress(model, INNER)  # noqa: E731
    assert against_oracle(model, tiny_inputs(NAME, PAIR, extra=1), attach, 4, **MODES[mode]) <= limits.logits


def test_eager_and_sdpa_keep_the_same_and_answer_alike(clip: Any, limits: Any) -> None:
    eager, inputs = tiny_model(NAME, attn_implementation="eager"), tiny_inputs(NAME, PAIR)
    logits = [prefill(model, vtc.compress(model, INNER), **inputs).logits[:, -1] for model in (clip, eager)]
    assert float((logits[0] - logits[1]).abs().max()) <= limits.logits


@pytest.mark.parametrize("method", ["vtc_cls", LastRowTopK()])
def test_eager_attention_is_refused_for_methods_with_taps(method: Any) -> None:
    model = tiny_model(NAME, attn_implementation="eager")
    with pytest.raises(UnsupportedModel, match=r"Attention runs eager attention.*attn_implementation='sdpa'"):
        vtc.compress(model, method, retention=0.7)


# --- labels and padded outputs
def labelled(model: Any, layout: Any = PAIR) -> dict[str, Tensor]:
    """Inputs with labels on the text, where the word before is still there to predict them."""
    inputs = tiny_inputs(NAME, layout, extra=1)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    visual = inputs["input_ids"] == model.config.image_token_id
    labels[visual] = -100
    labels[:, 1:][visual[:, :-1] | (inputs["attention_mask"] == 0)[:, :-1]] = -100
    return {**inputs, "labels": labels}


def test_labels_need_padded_outputs(clip: Any) -> None:
    with vtc.compress(clip, INNER), pytest.raises(UnsupportedCall, match="attach with pad_output=True"):
        clip(**labelled(clip))


@pytest.mark.parametrize("stages", [(0,), (0, 2)])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_loss_and_gradients_equal_the_oracle(clip: Any, limits: Any, stages: tuple[int, ...], positions: Any) -> None:
    inputs = labelled(clip)
    handle = vtc.compress(clip, FixedKeep(at=stages), positions=positions, pad_output=True)

    def train(manager: Any) -> tuple[Tensor, dict[str, Tensor]]:
        clip.zero_grad()
        with manager:
            loss = clip(**inputs, use_cache=False).loss
        loss.backward()
        return loss.detach(), {k: p.grad.clone() for k, p in clip.named_parameters() if p.grad is not None}

    loss, gradients = train(handle)
    expected_loss, expected = train(reference(clip, handle))
    assert float((loss - expected_loss).abs()) <= limits.logits
    assert gradients.keys() == expected.keys()
    assert any("vision_tower" in name and bool(grad.any()) for name, grad in gradients.items())
    assert any("multi_modal_projector" in name and bool(grad.any()) for name, grad in gradients.items())
    for name, grad in gradients.items():
        scale = max(1e-2, float(expected[name].abs().max()))  # key biases cancel in the softmax: theirs is noise
        assert float((grad - expected[name]).abs().max()) <= limits.gradient * scale, name


def test_recomputed_activations_give_the_same_gradients(clip: Any, limits: Any) -> None:
    inputs = labelled(clip)

    def gradient() -> Tensor:
        clip.zero_grad()
        with vtc.compress(clip, INNER, pad_output=True):
            clip(**inputs, use_cache=False).loss.backward()
        return clip.model.multi_modal_projector.linear_1.weight.grad.clone()

    clip.train()
    stored = gradient()
    getattr(clip, "activation_checkpointing_enable", clip.gradient_checkpointing_enable)()
    if repeats_hooks():
        with pytest.raises(UnsupportedCall, match="recomputes a layer together with its hooks"):
            gradient()
        return
    assert float((gradient() - stored).abs().max()) <= limits.gradient * float(stored.abs().max())


def test_a_label_behind_a_removed_token_is_refused(clip: Any) -> None:
    inputs = labelled(clip)
    visual = inputs["input_ids"] == clip.config.image_token_id
    behind = torch.nn.functional.pad(visual[:, :-1], (1, 0)) & ~visual
    inputs["labels"] = torch.where(behind, inputs["input_ids"], -100)
    handle = vtc.compress(clip, FixedKeep(rate=0.0), pad_output=True)
    with handle, pytest.raises(UnsupportedCall, match=r"a label follows a removed token.*-100"):
        clip(**inputs)


def test_labels_end_with_their_call(clip: Any) -> None:
    with vtc.compress(clip, INNER, pad_output=True) as handle, torch.no_grad():
        clip(**labelled(clip))
        clip.model(**tiny_inputs(NAME, [[3, "image", 9]]))  # the backbone alone, with a prompt of another length
    assert len(handle.stats.calls) == 2
    assert handle.errors == []


def test_padded_outputs_stand_at_their_input_places(clip: Any, limits: Any) -> None:
    for side in ("left", "right"):
        inputs = tiny_inputs(NAME, PAIR, extra=2, padding=side)  # type: ignore[arg-type]
        handle = vtc.compress(clip, INNER, pad_output=True)
        output = prefill(clip, handle, **inputs)
        alive = handle.trace[0].keep[2]
        expected = prefill(clip, reference(clip, handle), **inputs)
        assert output.logits.shape == expected.logits.shape
        assert float((output.logits - expected.logits)[alive].abs().max()) <= limits.logits
        assert bool((output.logits[~alive] == 0).all())


@pytest.mark.parametrize("asked_before", [False, True])
def test_rows_that_skip_a_layer_leave_it_as_they_entered(limits: Any, asked_before: bool) -> None:
    """Also in what the model tells of its layers, whether its own hooks came before the engine's or behind them."""
    model, more = tiny_model(NAME), {"output_hidden_states": True}
    inputs = tiny_inputs(NAME, PAIR, extra=2, model=model)
    if asked_before:
        prefill(model, nullcontext(), **inputs, **more)
    handle = vtc.compress(model, FixedKeep(at=(0, 1, 2, 3), skips=(1, 3)), pad_output=True)
    found = prefill(model, handle, **inputs, **more).hidden_states
    expected = prefill(model, reference(model, handle), **inputs, **more).hidden_states
    kept = handle.trace[0].keep
    for number, alive in enumerate((kept[0], kept[0], kept[0], kept[2], kept[2])):
        assert bool((found[number][~alive] == 0).all())
        assert float((found[number] - expected[number])[alive].abs().max()) <= limits.logits
    gone = kept[2] & ~kept[3]
    assert bool(gone.any()) and not torch.equal(found[3][gone], found[2][gone])
    skipped = kept[0] & ~kept[1]
    assert bool(skipped.any()) and torch.equal(found[2][skipped], found[1][skipped])


def test_padded_outputs_change_nothing_for_generation(clip: Any) -> None:
    inputs = tiny_inputs(NAME, PAIR, extra=1)
    plain = generate(clip, inputs, vtc.compress(clip, INNER), 4)
    padded = generate(clip, inputs, vtc.compress(clip, INNER, pad_output=True), 4)
    assert torch.equal(plain[0], padded[0])
    assert torch.equal(plain[1], padded[1])


# --- several models
def test_two_models_at_once_do_not_meet(clip: Any, siglip: Any) -> None:
    inputs = {NAME: tiny_inputs(NAME, PAIR), "llava-siglip": tiny_inputs("llava-siglip", PAIR, seed=2)}
    alone = [
        generate(model, inputs[name], vtc.compress(model, "vtc_cls", retention=0.5), 4)[1]
        for name, model in ((NAME, clip), ("llava-siglip", siglip))
    ]
    with vtc.compress(siglip, "vtc_cls", retention=0.5):
        with vtc.compress(clip, "vtc_cls", retention=0.5):
            assert torch.equal(generate(clip, inputs[NAME], nullcontext(), 4)[1], alone[0])
            assert torch.equal(generate(siglip, inputs["llava-siglip"], nullcontext(), 4)[1], alone[1])
        assert torch.equal(generate(siglip, inputs["llava-siglip"], nullcontext(), 4)[1], alone[1])
    assert (taps._taps, taps._users, taps._saved) == ({}, {}, {})


def test_two_models_in_two_threads() -> None:
    methods = [("vtc_cls", {"retention": 0.5}), (LastRowTopK(), {"retention": 0.7})]
    models = [tiny_model(NAME, seed=seed) for seed in range(2)]
    inputs = [tiny_inputs(NAME, PAIR, seed=seed) for seed in range(2)]

    def answer(k: int) -> Tensor:
        method, budget = methods[k]
        with vtc.compress(models[k], method, **budget), torch.no_grad():  # type: ignore[arg-type]
            return models[k](**inputs[k]).logits[:, -1]

    alone = [answer(k) for k in range(2)]
    wrong: list[Any] = []
    start = threading.Barrier(2)

    def work(k: int) -> None:
        try:
            start.wait()
            wrong.extend(k for _ in range(15) if not torch.equal(answer(k), alone[k]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (taps._taps, taps._users, taps._saved) == ({}, {}, {})


def test_one_model_in_two_threads(clip: Any) -> None:
    inputs = [tiny_inputs(NAME, PAIR, seed=seed) for seed in range(2)]
    wrong: list[Any] = []
    start = threading.Barrier(2)
    with vtc.compress(clip, "vtc_cls", retention=0.5):
        alone = [prefill(clip, nullcontext(), **given).logits[:, -1] for given in inputs]

        def work(k: int) -> None:
            try:
                start.wait()
                for _ in range(30):
                    if not torch.equal(prefill(clip, nullcontext(), **inputs[k]).logits[:, -1], alone[k]):
                        wrong.append(k)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
