"""The engine: hooks that let one method act inside one unmodified model, and leave no trace.

Hooks sit on the model (labels), the backbone (which tokens are visual), the language model (cache, positions, masks,
the stage before the LLM), on decoder layers (stages inside the LLM) and on the feature methods
(`vtc.engine.encoder`). Whatever must outlive a call lies in the KV cache; the state of a call lives in its
`LLMPass` and ends with it.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.adapters.placement import device_of
from vtc.batch.context import VisionContext
from vtc.batch.prompt import Bounds
from vtc.batch.trace import CallRecord, Stats
from vtc.engine.cache import CompressedCache
from vtc.engine.copies import CopyGuard
from vtc.engine.deepstack import take_over
from vtc.engine.encoder import VisionRecorder
from vtc.engine.entry import Entry
from vtc.engine.guards import BatchingBlock, check_without_media, refuse_skipped
from vtc.engine.inputs import (
    adopt_cache,
    align,
    asks_rows,
    by_name,
    carries_media,
    check_attentions,
    check_compiled,
    check_labels,
    check_router,
    given_contexts,
)
from vtc.engine.layer_hooks import LayerHooks
from vtc.engine.llm_pass import LLMPass, row_ends
from vtc.engine.llm_recorder import LLMRecorder
from vtc.engine.lookup import Lookup
from vtc.engine.maker import Maker
from vtc.engine.masks import first_mask
from vtc.engine.notes import bounded, guarded
from vtc.engine.pairs import Pair
from vtc.engine.passes import Passes
from vtc.engine.stages import StageRunner, check_plan
from vtc.errors import UnsupportedCall, VTCError
from vtc.method.base import Compressor, Plan, Positions
from vtc.method.budget import Budget, ItemBudgets

OWNER = "_vtc_engine"


class Engine:
    """One method attached to one model. `attach` and `detach` are the whole life cycle."""

    def __init__(
        self,
        adapter: Adapter,
        method: Compressor,
        plan: Plan,
        budget: Budget | ItemBudgets | None,
        positions: Positions,
        *,
        pad_output: bool,
        trace: bool,
        bounds: Bounds | None = None,
        processor: Any = None,
    ) -> None:
        check_plan(method, plan, adapter.spec)
        self.adapter, self.method, self.plan, self.budget = adapter, method, plan, budget
        self.positions, self.pad_output, self.tracing = positions, pad_output, trace
        self.spec = adapter.spec
        self.stats, self.trace, self.errors = Stats(), list[CallRecord](), bounded()
        self._loss, self._noting = threading.local(), threading.Lock()
        self.module = method.module(self.spec)
        if self.module is not None:
            self.module.to(device_of(adapter.language_model))
        pairs = [Pair(name, method.name, adapter, processor) for name in plan.needs.pairs]
        self.pairs = tuple(pair.shape for pair in pairs)
        self.passes = Passes[LLMPass]()
        self.llm_recorder = LLMRecorder(adapter, method, plan, self.module, self.passes)
        self.stages = StageRunner(adapter, method, plan, budget, self.module, pairs, self.llm_recorder)
        self.vision_recorder = VisionRecorder(adapter, plan.needs, self.stages.encoder, encoded=self._encoded)
        self.layers = LayerHooks(adapter, self.stages, self.passes, self.errors)
        self.lookup = Lookup(adapter, self.passes)
        self.entry = Entry(adapter, bounds or Bounds())
        self._warned = False
        self._handles: list[Any] = []
        self._blocks = (BatchingBlock(adapter.model), CopyGuard(adapter.model))

    # --- life cycle
    def attach(self) -> None:
        """Install all hooks. Raises VTCError when the model already carries an engine."""
        adapter = self.adapter
        if OWNER in adapter.model.__dict__:
            raise VTCError("this model already has a method attached; detach it first (leave its `with` block)")
        language_model = adapter.language_model
        layers = self.layers.find()
        inside = (*layers, *self.llm_recorder.hooked)
        self._hooked = (adapter.model, adapter.backbone, language_model, *inside)
        check_compiled(self._hooked, language_model, inside=bool(inside))
        adapter.model.__dict__[OWNER] = self
        self.entry.watch.install()
        self.vision_recorder.install()
        self.llm_recorder.install()
        if 0 in self.stages.noted:
            self.lookup.install()
        handles = self._handles
        handles.append(adapter.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        handles.append(adapter.model.register_forward_hook(self._leave_model, with_kwargs=True, always_call=True))
        handles.append(adapter.backbone.register_forward_pre_hook(self._enter_backbone, with_kwargs=True))
        handles.append(adapter.backbone.register_forward_hook(self._leave_backbone, with_kwargs=True, always_call=True))
        handles.append(language_model.register_forward_pre_hook(self._enter_llm, with_kwargs=True))
        handles.append(language_model.register_forward_hook(self._leave_llm, with_kwargs=True, always_call=True))
        self.layers.install(layers)
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
        self.layers.remove()
        for one in self.passes:
            self._drop(one)
        for block in self._blocks:
            block.remove()
        if self.attached:
            self.entry.watch.remove()
            self.vision_recorder.remove()
            self.llm_recorder.remove()
            self.lookup.remove()
            del self.adapter.model.__dict__[OWNER]

    @property
    def bounds(self) -> Bounds:
        """What the caller says about the rows of a call."""
        return self.entry.bounds

    @bounds.setter
    def bounds(self, bounds: Bounds) -> None:
        self.entry.bounds = bounds

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """Of the calling thread's last forward pass."""
        return getattr(self._loss, "value", None)

    # --- hooks
    @guarded
    def _enter_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        one, given = self._begin(module), by_name(module, args, kwargs)
        one.labels, one.numbered, one.media = given.get("labels"), asks_rows(given), carries_media(given)
        if one.labels is not None and not self.pad_output:
            raise UnsupportedCall(
                "labels were given while visual tokens are removed, so logits and labels would not line up; "
                "attach with pad_output=True"
            )
        if one.media:
            check_compiled(self._hooked, self.adapter.language_model, inside=False)

    @guarded
    def _enter_backbone(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None or one.inside:
            one = self._begin(module)
        one.inside, given = True, by_name(module, args, kwargs)
        if carries_media(given):
            one.given = given_contexts(given, self.vision_recorder.recall)
            self.entry.find(one, given)
            return args, self.lookup.begin(one, given, kwargs)
        self._warned = check_without_media(given, self.adapter.placeholders.values(), self._warned)
        return None

    def _encoded(self, context: VisionContext, output: Any) -> Any:
        """The encoder has run; where the backbone called it, its pass takes the description."""
        one = self.passes.current
        if one is None or not one.inside or one.batch is not None:
            return output
        one.contexts = (*one.contexts, context)
        return output if one.rows is None else one.rows.narrow(context.kind, output)

    @guarded
    def _enter_llm(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = self.passes.current
        if one is None or one.batch is not None:
            one = self._begin(module)
        if one.media and one.placeholders is None:
            refuse_skipped("the module around the language model")
        one.media = False
        states = self.lookup.states(one, kwargs["inputs_embeds"])
        one.batch = self.entry.batch(one, kwargs)
        if self.tracing and one.now.items is not None:
            one.record = CallRecord.of(one.now.items)
        if not isinstance(kwargs.get("past_key_values"), CompressedCache):
            if one.now.items is None:
                return args, {**kwargs, "inputs_embeds": states.all()}
            if self.stages.keeps_all(one.now, one.contexts):
                one.note_group(0)
                for stage in self.stages.noted:
                    one.note(stage)
                return args, {**kwargs, "inputs_embeds": states.all()}
            check_router(kwargs)
        self.llm_recorder.check_checkpointing()
        config = self.adapter.language_model.config
        check_attentions(kwargs, config, self.pad_output and one.now.items is not None)
        self._conduct(one, kwargs)
        hidden = states.all() if one.now.items is None else self.stages.run(0, one, states)
        positions, mask = one.enter(0, hidden.device)
        if mask is None and one.cache is None:
            # Without cache and mask, gapped position ids would be taken for several packed sequences.
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        kwargs |= {
            "inputs_embeds": hidden,
            "position_ids": positions,
            "attention_mask": first_mask(config, one, mask, hidden),
        }
        if one.cache is not None:
            one.cache.seen += one.now.length
        return args, kwargs

    @guarded
    def _leave_llm(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        one = self.passes.current
        if one is None or one.batch is None:  # nothing was entered; of pixels that went in the model's hook knows
            self._leave(module)
            return output
        try:
            if output is not None:
                self._finish(one, output)
        except BaseException:
            output = None
            raise
        finally:
            if one.conducted:
                (one.fail if output is None else one.finish)()
            one.conducted = False
            self._leave(module)
        return output

    @guarded
    def _leave_backbone(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if output is not None and (one := self.passes.current) is not None:
            self.lookup.restore(one, output)
        self._leave(module)

    @guarded
    def _leave_model(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        one = self._leave(module)
        if one is not None and one.media and output is not None:
            refuse_skipped("the language model")

    # --- one pass
    def _begin(self, module: Any) -> LLMPass:
        """Begin a pass with `module`, its outermost one; what is still there was left without a sign."""
        while (stale := self.passes.current) is not None:
            self._drop(stale)
        return self.passes.begin(LLMPass(outermost=module, policy=self.positions))

    def _leave(self, module: Any) -> LLMPass | None:
        """End the pass that began with `module`."""
        one = self.passes.current
        if one is None or one.outermost is not module:
            return None
        self.passes.end(one)
        return one

    def _drop(self, one: LLMPass) -> None:
        if one.conducted:
            one.interrupt()
        self.passes.end(one)

    def _conduct(self, one: LLMPass, kwargs: dict[str, Any]) -> None:
        """Take the call's cache and features over."""
        before = kwargs.get("past_key_values")
        one.adopted = not isinstance(before, CompressedCache)  # asked before it is adopted in place
        one.cache = adopt_cache(kwargs, self.adapter.language_model, self.stages.starts, self.maker)
        kwargs["past_key_values"] = one.cache
        if one.now.items is not None and one.policy != "preserve":  # nothing else is ever renumbered by a stage
            one.ends = row_ends(one.now.rows)
        if one.cache is not None:
            one.cache.begin()
        one.conducted = True
        one.features, rows = take_over(kwargs, one.now.rows)
        one.batch = replace(one.now, rows=rows)

    def _finish(self, one: LLMPass, output: Any) -> None:
        """Evict, note what happened, and put the output's rows where the caller looks for them."""
        if one.conducted and len(one.spans) != len(self.stages.starts):
            refuse_skipped("every LLM layer")
        aligned = one.pruned and (self.pad_output or one.numbered)
        if aligned and self.pad_output:
            check_labels(one.now, one.labels)
        if one.losses:
            self._loss.value = torch.stack([loss.to(one.losses[0].device) for loss in one.losses]).sum()
        if one.conducted and one.now.items is not None:
            self.stages.evict(one, output.last_hidden_state)
        with self._noting:
            if one.now.items is not None:
                self.stats.add(one.stats(self.spec.llm_layers, output.past_key_values))
                self.trace += [] if one.record is None else [one.record]
            else:
                self.stats.other_calls += 1
            self.stats.seconds += one.seconds
        if aligned:
            align(one, output)

    @functools.cached_property
    def maker(self) -> Maker:
        """What the caches of this engine say filled them."""
        return Maker.of(self.method, self.plan, self.budget, self.positions)
