"""Running a method's stages inside a call: build the view, ask the method, carry out what it selected."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.adapters.compat import checkpoints
from vtc.batch.context import VisionContext
from vtc.batch.items import ItemTable
from vtc.engine.call import Call
from vtc.engine.encoder_stages import EncoderStages
from vtc.engine.taps import TapSet, look_ahead
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import CacheStage, Compressor, EncoderStage, Plan, Selection, Stage, StageView
from vtc.method.budget import Budget
from vtc.method.readings import AttentionCall, LLMReading, QueryRows, exact


class StageRunner:
    """One method's stages on one model.

    inner: LLM layers before which it acts, 0 included. starts: first layer of every group of layers that hold the same
    rows. cache: its stage after the prefill. encoder: its stages inside the vision encoder. noted: stages under which a
    trace lists what is left; what the encoder dropped shows at 0.
    """

    def __init__(
        self, adapter: Adapter, method: Compressor, plan: Plan, budget: Budget | None, module: nn.Module | None = None
    ) -> None:
        self.adapter, self.method, self.plan, self.budget, self.spec = adapter, method, plan, budget, adapter.spec
        self.module = module
        self.learns = module is not None and any(weight.requires_grad for weight in module.parameters())
        self.inner = sorted(stage for stage in plan.stages if isinstance(stage, int))
        after = [stage for stage in plan.stages if isinstance(stage, CacheStage)]
        if len(after) > 1:
            raise UnsupportedMethod(f"{method.name!r} names {len(after)} stages after the prefill; name one CacheStage")
        self.cache = after[0] if after else None
        bounds = [*self.inner, *(stage.from_layer for stage in after)]
        layers = self.spec.llm_layers
        beyond = [layer for layer in [*bounds, *plan.needs.llm] if not 0 <= layer < layers]
        if beyond:
            raise UnsupportedMethod(
                f"{method.name!r} acts at or reads LLM layer {beyond[0]}; this {self.spec.family} model has layers 0 "
                f"to {layers - 1}; choose among them"
            )
        self.starts = tuple(sorted({0, *bounds}))
        inside = [stage for stage in plan.stages if isinstance(stage, EncoderStage)]
        self.encoder = EncoderStages(adapter, method, inside, budget, plan.needs, module) if inside else None
        self.noted: list[Stage] = [*sorted({*self.inner, *([0] if inside else [])}), *after]

    def taps(self, adapter: Adapter, current: functools.partial[Call | None]) -> TapSet:
        """Taps for the LLM rows the plan needs; `current` returns the call in progress."""
        attention = adapter.llm_attention
        pairs = self.plan.needs.llm_pairs
        for layer, reading in pairs:
            if not isinstance(reading, LLMReading):
                raise UnsupportedMethod(
                    f"{reading.name!r} was asked for of an LLM layer, but is a reading of the vision encoder; write "
                    "Rows.LAST, for example"
                )
            if reading.ahead and layer not in self.inner:
                raise UnsupportedMethod(
                    f"{reading.name!r} of LLM layer {layer} is read at the stage before that layer, which "
                    f"{self.method.name!r} does not have; add the stage or read another layer"
                )
        record = functools.partial(self._record, current)
        return TapSet(
            (attention[layer], _nothing if one.ahead else functools.partial(record, layer, one)) for layer, one in pairs
        )

    def _record(
        self, current: functools.partial[Call | None], layer: int, reading: LLMReading, attention: AttentionCall
    ) -> None:
        """Read an attention call, keep what concerns the rows of the current chunk."""
        call = current()
        if call is None or call.items is None or not self.method.reads(self.spec, layer, call.memory):
            return
        mask = attention.mask
        if not isinstance(mask, Tensor):  # no mask, or a block mask: the group's own validity and causality say so too
            mask = call.valid if call.cache is None else call.cache.masks[call.group]
        call.llm_rows[layer, reading] = _read(reading, attention, call, mask, graph=self.learns)

    def _read_ahead(self, layer: int, reading: LLMReading, call: Call, hidden: Tensor) -> Tensor:
        """[..., B, L] what `reading` says of layer `layer`, which `hidden` is about to enter."""
        with torch.no_grad():
            given = self.adapter.attention_input(layer, hidden)
            attention = look_ahead(self.adapter.llm_attention[layer], given, call.rotary)
        mask = call.valid
        if call.cache is not None and (old := call.cache.physical_length(layer)):
            key = torch.cat([call.cache.layers[layer].keys.to(attention.key), attention.key], dim=2)
            attention = dataclasses.replace(attention, key=key)
            before = call.cache.masks[layer]
            if mask is not None or before is not None:
                ones = torch.ones(call.batch, old, dtype=torch.bool, device=hidden.device)
                mask = torch.cat([ones if before is None else before.to(hidden.device), call.valid_rows()], dim=1)
        return _read(reading, attention, call, mask, graph=self.learns)

    def check_checkpointing(self) -> None:
        """Raise UnsupportedCall where recomputed layers would lack the gradients of what was read of them."""
        if not self.learns or not any(reading.differentiable for _, reading in self.plan.needs.llm_pairs):
            return
        if checkpoints(self.adapter.language_model):
            raise UnsupportedCall(
                f"{self.method.name!r} trains on what it reads of LLM layers, and gradient checkpointing recomputes "
                "these without it; switch checkpointing off: model.gradient_checkpointing_disable()"
            )

    def keeps_all(self, items: ItemTable, contexts: tuple[VisionContext, ...]) -> bool:
        """True when the budget keeps every token of every item: then the model must stay untouched, bit for bit."""
        if any(context.alive is not None for context in contexts):
            return False
        return all(self.method.keeps_all(self.budget, count) for count in items.input_counts)

    def run(self, stage: int, call: Call, hidden: Tensor, contexts: tuple[VisionContext, ...]) -> Tensor:
        """Pass `stage`: [B, L, D] rows in, [B, L', D] rows out."""
        if stage == 0:
            hidden = _drop_encoded(call, hidden, contexts)
        selection = None
        if stage in self.inner:
            selection = self.select(stage, call, hidden, contexts)
            call.staged = True
        if selection is not None:
            hidden = call.apply(stage, selection, hidden)
        elif stage in self.noted:
            call.note_stage(stage)
        if stage == 0 and call.items is not None:
            call.items = dataclasses.replace(call.items, entered=call.items.counts)
        return hidden

    def select(self, stage: Stage, call: Call, hidden: Tensor, contexts: tuple[VisionContext, ...]) -> Selection | None:
        """Ask the method what to keep."""
        items, separators = call.items, call.separators
        assert items is not None and separators is not None
        assert call.visual is not None and call.prompt is not None and call.text is not None
        device, valid = hidden.device, call.valid_rows()
        keys = torch.cat([context.fingerprint.to(device) for context in contexts])
        if stage == 0:
            items = dataclasses.replace(items, entered=items.counts)
        view = StageView(
            stage=stage,
            model=self.spec,
            budget=self.budget,
            items=items,
            separators=separators,
            hidden=hidden,
            visual=call.visual & valid,
            valid=valid,
            prompt=call.prompt & valid,
            text=call.text & valid,
            fingerprint=keys[items.source],
            vision_rows={
                pair: _stack([context.attention[pair].to(device) for context in contexts])
                for pair in self.plan.needs.vision_pairs
            },
            llm_rows=_LLMRows(call.llm_rows, lambda layer, reading: self._read_ahead(layer, reading, call, hidden)),
            needs=self.plan.needs,
            memory=call.memory,
            module=self.module,
        )
        with exact(device):
            return self.method.select(view)

    def evict(self, call: Call, hidden: Tensor, contexts: tuple[VisionContext, ...]) -> None:
        """After the prefill: drop the cached rows of tokens the method gives up. Synchronises once per layer group."""
        stage, cache = self.cache, call.cache
        if stage is None or cache is None:
            return
        call.to(hidden.device)
        items = call.items
        assert items is not None
        selection = self.select(stage, call, hidden, contexts)
        if selection is None:
            call.note_stage(stage)
            return
        alive = call.over_input(call.source, items.scatter(selection.keep & items.mask, call.valid_rows()))
        call.note_eviction(stage, alive)
        for group in self.starts:
            if group < stage.from_layer:
                continue
            source, valid = call.sources[group]
            chunk = alive.gather(1, source)
            chunk = chunk if valid is None else chunk & valid
            old = cache.physical_length(group) - chunk.shape[1]
            cache.evict(group, torch.cat([chunk.new_ones(call.batch, old), chunk], dim=1))


class _LLMRows(dict[tuple[int, LLMReading], Tensor]):
    """What was recorded so far, and what is read ahead, computed when it is asked for."""

    def __init__(
        self, recorded: dict[tuple[int, LLMReading], Tensor], ahead: Callable[[int, LLMReading], Tensor]
    ) -> None:
        super().__init__(recorded)
        self._ahead = ahead

    def __missing__(self, pair: tuple[int, LLMReading]) -> Tensor:
        layer, reading = pair
        if not reading.ahead:
            raise UnsupportedMethod(
                f"{reading.name!r} of LLM layer {layer} was not recorded; name it in the Needs of the method's plan, "
                "and let `reads` return True for that layer"
            )
        self[pair] = self._ahead(layer, reading)
        return self[pair]


def _read(reading: LLMReading, attention: AttentionCall, call: Call, mask: Tensor | None, *, graph: bool) -> Tensor:
    """[..., B, L] for the rows of the current chunk; mask: as `attention_rows` takes it. graph: something learns."""
    assert call.visual is not None and call.prompt is not None and call.text is not None
    valid = call.valid_rows()
    prompt = call.prompt & valid
    last = (torch.arange(call.rows, device=valid.device) * prompt).amax(1, keepdim=True)
    rows = QueryRows(prompt, call.visual & valid, call.text & valid, call.text_count, last, mask)
    with torch.set_grad_enabled(graph and torch.is_grad_enabled() and reading.differentiable), exact(valid.device):
        return reading.read(attention, rows)[..., -call.rows :]


def _nothing(attention: AttentionCall) -> None:
    """A tap that makes a module's queries and keys readable ahead."""


def _drop_encoded(call: Call, hidden: Tensor, contexts: tuple[VisionContext, ...]) -> Tensor:
    """Remove the tokens whose patches an encoder stage dropped."""
    items = call.items
    if items is None or all(context.alive is None for context in contexts):
        return hidden
    marks: list[Tensor] = []
    counts: list[int] = []
    for context in contexts:
        sizes = tuple(item.n_tokens - item.newlines for item in context.items)
        width = max(item.n_tokens for item in context.items)
        mark, kept = context.alive or (torch.ones(len(sizes), width, dtype=torch.bool), sizes)
        marks.append(mark.to(hidden.device))
        counts += kept
    alive = _stack(marks)[items.source].gather(1, items.token)
    return call.apply(0, Selection(alive, counts=[counts[source] for source in items.sources]), hidden)


def _stack(parts: list[Tensor]) -> Tensor:
    """[I_c, N_c, ...] tables of several contexts as one [I, N, ...], zero-padded."""
    width = max(part.shape[1] for part in parts)
    flat = (0, 0) * (parts[0].ndim - 2)
    return torch.cat([torch.nn.functional.pad(part, (*flat, 0, width - part.shape[1])) for part in parts])
