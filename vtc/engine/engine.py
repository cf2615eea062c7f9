"""The engine: hooks that let one method act inside one unmodified model, and leave no trace.

Hooks sit on the model (labels), the backbone (which tokens are visual), the language model (cache, positions, masks,
the stage before the LLM), on decoder layers (stages inside the LLM) and on the feature methods
(`vtc.engine.encoder`). Whatever must outlive a call lies in the KV cache; the state of a call lives in `Call` and ends
with it.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.adapters.compat import check_checkpointing
from vtc.batch.prompt import Bounds, Prompt
from vtc.batch.trace import CallRecord, Stats
from vtc.batch.visuals import Visuals, host_counts
from vtc.engine.cache import CompressedCache
from vtc.engine.call import Call
from vtc.engine.compiled import check_compiled
from vtc.engine.copies import CopyGuard
from vtc.engine.deepstack import Deepstack
from vtc.engine.encoder import VisionRecorder
from vtc.engine.generating import GenerateWatch, control_tokens
from vtc.engine.guards import BatchingBlock, check_without_media, refuse_skipped
from vtc.engine.inputs import (
    adopt_cache,
    by_name,
    carries_media,
    check_router,
    given_contexts,
    logical_positions,
    mask_2d,
    placeholder_masks,
)
from vtc.engine.maker import Maker
from vtc.engine.masks import attention_of, group_mask, model_mask
from vtc.engine.notes import bounded, without_frames
from vtc.engine.open_calls import OpenCalls
from vtc.engine.outputs import align, asks_rows, check_attentions, check_labels
from vtc.engine.stages import StageRunner
from vtc.engine.thread_state import ThreadLoss, ThreadState
from vtc.errors import UnsupportedCall, VTCError
from vtc.method.base import Compressor, Plan, Positions
from vtc.method.budget import Budget

OWNER = "_vtc_engine"


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Count the hook's host time and remember what it raised, for callers that swallow exceptions."""

    @functools.wraps(hook)
    def guarded(self: Engine, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self.errors.append(without_frames(error))
            raise
        finally:
            self._state.seconds += time.perf_counter() - start

    return guarded


class Engine:
    """One method attached to one model. `attach` and `detach` are the whole life cycle."""

    def __init__(
        self,
        adapter: Adapter,
        method: Compressor,
        plan: Plan,
        budget: Budget | None,
        positions: Positions,
        *,
        pad_output: bool,
        trace: bool,
        bounds: Bounds | None = None,
    ) -> None:
        self.adapter, self.method, self.plan, self.budget = adapter, method, plan, budget
        self.positions, self.pad_output, self.tracing = positions, pad_output, trace
        self.spec = adapter.spec
        self.stats, self.trace, self.errors = Stats(), list[CallRecord](), bounded()
        self._loss, self._noting = ThreadLoss(), threading.Lock()
        self.module = method.module(self.spec)
        if self.module is not None:
            self.module.to(adapter.model.device)
        self.stages = StageRunner(adapter, method, plan, budget, self.module)
        self.recorder = VisionRecorder(adapter, plan.needs, self.stages.encoder)
        self.taps = self.stages.taps(adapter, functools.partial(lambda: self._state.call))
        self.placeholders, self.controls = adapter.placeholders, control_tokens(adapter.model)
        self.watch, self.bounds = GenerateWatch(adapter.model), bounds or Bounds()
        self._state, self._open, self._warned = ThreadState(), OpenCalls(), False
        self._handles: list[Any] = []
        self._blocks = (BatchingBlock(adapter.model), CopyGuard(adapter.model))

    # --- life cycle
    def attach(self) -> None:
        """Install all hooks. Raises VTCError when the model already carries an engine."""
        adapter = self.adapter
        if OWNER in adapter.model.__dict__:
            raise VTCError("this model already has a method attached; detach it first (leave its `with` block)")
        first = min([*self.stages.starts[1:], 1 if adapter.deepstack else len(adapter.layers)])
        language_model = adapter.language_model
        # FlashAttention reads gapped position ids as packed sequences: there they are withheld from every layer.
        flash = "flash" in attention_of(language_model.config)
        layers = [(i, layer) for i, layer in enumerate(adapter.layers) if i >= first or flash]
        self._hooked = (adapter.model, adapter.backbone, language_model, *(layer for _, layer in layers))
        check_compiled(self._hooked, language_model, inside=bool(layers))
        adapter.model.__dict__[OWNER] = self
        self.watch.install()
        self.recorder.install()
        self.taps.install()
        handles = self._handles
        handles.append(adapter.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        handles.append(adapter.model.register_forward_hook(self._leave_model, with_kwargs=True))
        handles.append(adapter.backbone.register_forward_pre_hook(self._enter_backbone, with_kwargs=True))
        handles.append(language_model.register_forward_pre_hook(self._enter_llm, with_kwargs=True))
        handles.append(language_model.register_forward_hook(self._leave_llm, with_kwargs=True, always_call=True))
        for index, layer in layers:
            hook = functools.partial(self._enter_layer, index)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for block in self._blocks:
            block.install()

    @property
    def attached(self) -> bool:
        """True until `detach`."""
        return self.adapter.model.__dict__.get(OWNER) is self

    def detach(self) -> None:
        """Remove everything; harmless when already detached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._open.interrupt_all()
        for block in self._blocks:
            block.remove()
        if self.attached:
            self.watch.remove()
            self.recorder.remove()
            self.taps.remove()
            del self.adapter.model.__dict__[OWNER]
        self._state = ThreadState()

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Of the calling thread's last forward pass."""
        return self._loss.value

    # --- hooks
    @_guarded
    def _enter_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(module, args, kwargs)
        labels = given.get("labels")
        if labels is not None and not self.pad_output:
            raise UnsupportedCall(
                "labels were given while visual tokens are removed, so logits and labels would not line up; "
                "attach with pad_output=True"
            )
        state = self._state
        state.labels, state.rows, state.media = labels, asks_rows(given), carries_media(given)
        if state.media:
            check_compiled(self._hooked, self.adapter.language_model, inside=False)

    @_guarded
    def _leave_model(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        state = self._state
        state.rows, media, state.media = False, state.media, False
        if media:
            refuse_skipped("the language model")

    @_guarded
    def _enter_backbone(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._state
        if state.call is not None:
            self._open.interrupt(state.call)
        state.call, state.untouched, state.placeholders, state.ids, state.contexts = None, None, None, None, ()
        self.recorder.contexts = []
        given = by_name(module, args, kwargs)
        if carries_media(given):
            state.contexts = given_contexts(given, self.recorder.recall)
            state.ids = given.get("input_ids")
            table = self.adapter.model.get_input_embeddings()
            state.placeholders = placeholder_masks(given, self.placeholders.values(), table)
            state.control = placeholder_masks(given, self.controls, table).any(0) if self.controls else None
        else:
            self._warned = check_without_media(given, self.placeholders.values(), self._warned)

    @_guarded
    def _enter_llm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, visuals = self._state, self._visuals(kwargs)
        if state.call is not None:
            self._open.interrupt(state.call)
            state.call = None
        if state.media and state.placeholders is None:
            refuse_skipped("the module around the language model")
        state.media = False
        if not isinstance(kwargs.get("past_key_values"), CompressedCache):
            if visuals is None:
                return None
            if self.stages.keeps_all(visuals.items, self._state.contexts):
                self._pass(kwargs, visuals)
                return None
            check_router(kwargs)
        hidden: Tensor = kwargs["inputs_embeds"]
        self.stages.check_checkpointing()
        config = self.adapter.language_model.config
        check_attentions(kwargs, config, self.pad_output and visuals is not None)
        call = state.call = self._begin(kwargs, visuals)
        call.deepstack = Deepstack.pop(kwargs)
        if visuals is not None:
            hidden = self.stages.run(0, call, hidden, self._state.contexts)
        positions, mask = call.enter(0, hidden.device)
        if mask is None and call.cache is None:
            # Without cache and mask, gapped position ids would be taken for several packed sequences.
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        kwargs |= {
            "inputs_embeds": hidden,
            "position_ids": positions,
            "attention_mask": model_mask(config, mask, hidden),
        }
        if call.cache is not None:
            call.cache.seen += call.length
        return args, kwargs

    @_guarded
    def _enter_layer(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._state.call
        if call is None:
            return None
        check_checkpointing(module)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if call.deepstack is not None:
            hidden = call.deepstack.add(index, hidden, call.valid)
        if index > 0 and index in self.stages.starts:
            call.to(hidden.device)
            call.rotary = call.group_inputs[1] if call.group else kwargs["position_embeddings"]
            if call.items is not None:
                hidden = self.stages.run(index, call, hidden, self._state.contexts)
            positions, mask = call.enter(index, hidden.device)
            call.group_inputs = (
                group_mask(self.adapter.language_model.config, call, index, mask, hidden),
                self.adapter.language_model.rotary_emb(hidden, positions),
            )
        kwargs["position_ids"] = None  # rotary phases come from position_embeddings; ids only feed packing detection
        if call.group > 0:
            kwargs["attention_mask"], kwargs["position_embeddings"] = call.group_inputs
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    @_guarded
    def _leave_llm(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        state = self._state
        labels, state.labels = state.labels, None
        call, state.call = state.call, None
        noted, state.untouched = call or state.untouched, None
        state.placeholders = None
        try:
            if output is not None:
                self._finish(call, noted, labels, output)
        except BaseException:
            output = None
            raise
        finally:
            state.contexts, state.control = (), None
            if call is not None:
                (self._open.fail if output is None else self._open.end)(call)
        return output

    def _finish(self, call: Call | None, noted: Call | None, labels: Tensor | None, output: Any) -> None:
        """Evict, note what happened, and put the output's rows where the caller looks for them."""
        state = self._state
        if call is not None and len(call.groups) != len(self.stages.starts):
            refuse_skipped("every LLM layer")
        aligned = call is not None and call.pruned and (self.pad_output or state.rows)
        if call is not None and aligned and self.pad_output:
            check_labels(call, labels)
        if call is not None and call.losses:
            self._loss.value = torch.stack(call.losses).sum()
        if call is not None and call.items is not None:
            self.stages.evict(call, output.last_hidden_state, state.contexts)
        with self._noting:
            if noted is not None and noted.items is not None:
                self._note(noted, output.past_key_values)
            else:
                self.stats.other_calls += 1
            self.stats.seconds += state.seconds
        state.seconds = 0.0
        if call is not None and aligned:
            align(call, output)

    # --- one call
    def _visuals(self, kwargs: dict[str, Any]) -> Visuals | None:
        """What this call brings to look at; one host synchronisation where media are carried."""
        state = self._state
        state.contexts = state.contexts or tuple(self.recorder.contexts)
        self.recorder.contexts = []
        if state.placeholders is None:
            return None
        before = kwargs.get("past_key_values")
        limit = self.watch.limit(0 if before is None else before.get_seq_length())
        visual = state.placeholders.any(0)
        prompt = Prompt.find(visual, state.control, mask_2d(kwargs), state.labels, limit, self.bounds)
        counts = host_counts(state.placeholders, prompt)
        if not any(counts.kinds):
            return None
        state.contexts = self.adapter.regroup(state.contexts, state.placeholders, state.ids)
        return Visuals.find(state.placeholders, state.contexts, list(self.placeholders), counts, prompt)

    def _begin(self, kwargs: dict[str, Any], visuals: Visuals | None) -> Call:
        hidden = kwargs["inputs_embeds"]
        batch, length = hidden.shape[:2]
        mask, before = mask_2d(kwargs), kwargs.get("past_key_values")
        plain = not isinstance(before, CompressedCache)  # asked before it is adopted in place
        seen, ids = 0 if before is None else before.get_seq_length(), kwargs.get("position_ids")
        logical = logical_positions(ids, batch, length, seen, hidden.device, mrope=self.spec.mrope)
        valid = mask[:, -length:].bool() if mask is not None and length > 1 else None
        if visuals is not None:
            valid = None if all(total == length for total in visuals.row_counts) else valid
        cache = adopt_cache(kwargs, self.adapter.language_model, self.stages.starts, self.maker)
        kwargs["past_key_values"] = cache
        call = Call(logical, valid, self.positions, cache, visuals, self.tracing, plain)
        self._open.begin(call)
        return call

    @functools.cached_property
    def maker(self) -> Maker:
        """What the caches of this engine say filled them."""
        return Maker.of(self.method, self.plan, self.budget, self.positions)

    def _pass(self, kwargs: dict[str, Any], visuals: Visuals) -> None:
        """Note a call whose budget keeps everything; the model runs it untouched."""
        mask, (batch, length) = mask_2d(kwargs), kwargs["inputs_embeds"].shape[:2]
        device = visuals.visual.device
        valid = mask[:, -length:].bool().to(device) if mask is not None else None
        logical = logical_positions(None, batch, length, 0, device, mrope=False)
        call = Call(logical, valid, self.positions, None, visuals, self.tracing)
        call.pass_through(self.stages.noted)
        self._state.untouched = call

    def _note(self, call: Call, cache: Any) -> None:
        self.stats.calls.append(call.stats(self.spec.llm_layers, cache, self._state.seconds))
        if call.record is not None:
            self.trace.append(call.record)
