"""What a plan needs of LLM layers, recorded while the prompt passes through them or read ahead at a stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.adapters.compat import checkpoints
from vtc.batch.rows import Batch
from vtc.engine.blocks import BlockHooks
from vtc.engine.llm_pass import LLMPass
from vtc.engine.passes import Passes
from vtc.engine.taps import TapSet, look_ahead
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import Compressor, Plan
from vtc.method.readings import AttentionCall, BlockReading, LLMReading, QueryRows, exact


class LLMRecorder:
    """Taps and hooks on LLM layers that note what they read in the pass that is running.

    module: learned weights of the method. hooked: modules that carry hooks while this is installed.
    """

    def __init__(
        self, adapter: Adapter, method: Compressor, plan: Plan, module: nn.Module | None, passes: Passes[LLMPass]
    ) -> None:
        self._adapter, self._method, self._plan, self._passes = adapter, method, plan, passes
        self._learns = module is not None and any(weight.requires_grad for weight in module.parameters())
        pairs = plan.needs.llm_pairs
        for layer, reading in pairs:
            self._check(layer, reading)
        self._taps = TapSet(
            (adapter.llm_attention[layer], _nothing if one.ahead else functools.partial(self._record, layer, one))
            for layer, one in pairs
            if not isinstance(one, BlockReading)
        )
        blocks = [(layer, one) for layer, one in pairs if isinstance(one, BlockReading)]
        self._hooks = BlockHooks(adapter, blocks, self._record_block, plan.skips if plan.gains else (), self._weigh)
        self.hooked = self._hooks.modules

    def _check(self, layer: int, reading: object) -> None:
        if not isinstance(reading, LLMReading):
            name = getattr(reading, "name", reading)
            raise UnsupportedMethod(
                f"{name!r} was asked for of an LLM layer, but is a reading of the vision encoder; write Rows.LAST, for "
                "example"
            )
        if reading.ahead and layer not in self._plan.stages:
            raise UnsupportedMethod(
                f"{reading.name!r} of LLM layer {layer} is read at the stage before that layer, which "
                f"{self._method.name!r} does not have; add the stage or read another layer"
            )

    def install(self) -> None:
        """Place taps and hooks."""
        self._taps.install()
        self._hooks.install()

    def remove(self) -> None:
        """Take them away; harmless when there are none."""
        self._taps.remove()
        self._hooks.remove()

    def check_checkpointing(self) -> None:
        """Raise UnsupportedCall where recomputed layers would lack gradients of what was read of them, or gains."""
        trains = self._learns and any(reading.differentiable for _, reading in self._plan.needs.llm_pairs)
        if (trains or self._plan.gains) and checkpoints(self._adapter.language_model):
            what = "trains on what it reads of LLM layers" if trains else "weighs what the MLPs of LLM layers add"
            raise UnsupportedCall(
                f"{self._method.name!r} {what}, and gradient checkpointing recomputes these without it; switch "
                "checkpointing off: model.gradient_checkpointing_disable()"
            )

    def rows(self, one: LLMPass, hidden: Callable[[], Tensor]) -> LLMRows:
        """What was recorded in the pass so far, and is read ahead of what `hidden` gives, [B, L, D] rows."""
        recorded = {key: values for key, values in one.now.rows.extra.items() if isinstance(key, tuple)}
        return LLMRows(recorded, lambda layer, reading: self._read_ahead(layer, reading, one, hidden()))

    def _reader(self, layer: int) -> LLMPass | None:
        """The pass that notes what layer `layer` does now, None where nobody does."""
        one = self._passes.current
        if one is None or not one.conducted or one.now.items is None:
            return None
        return one if self._method.reads(self._adapter.spec, layer, one.memory) else None

    def _record_block(self, layer: int, reading: BlockReading, block: int, before: Tensor, after: Tensor) -> None:
        """Read what a block, 0 for attention and 1 for MLP, made of the rows."""
        one = self._reader(layer)
        if one is None:
            return
        batch, key = one.now, (layer, reading)
        with torch.no_grad(), exact(before.device):
            found = reading.changed(before, after, _queries(batch, batch.rows.valid))[None]
        found = torch.cat([batch.rows.extra[key], found]) if block else found
        one.batch = dataclasses.replace(batch, rows=batch.rows.note(key, found))

    def _record(self, layer: int, reading: LLMReading, attention: AttentionCall) -> None:
        """Read an attention call, keep what concerns the rows of the current chunk."""
        one = self._reader(layer)
        if one is None:
            return
        mask, batch = attention.mask, one.now
        if not isinstance(mask, Tensor):  # no mask, or a block mask: the group's own validity and causality say so too
            mask = batch.rows.valid if one.cache is None else one.cache.masks[one.group]
        found = self._read(reading, attention, batch, mask)
        one.batch = dataclasses.replace(batch, rows=batch.rows.note((layer, reading), found))

    def _read_ahead(self, layer: int, reading: LLMReading, one: LLMPass, hidden: Tensor) -> Tensor:
        """[..., B, L] what `reading` says of layer `layer`, which `hidden` is about to enter."""
        with torch.no_grad():
            given = self._adapter.attention_input(layer, hidden)
            attention = look_ahead(self._adapter.llm_attention[layer], given, one.rotary)
        rows, cache = one.now.rows, one.cache
        mask = rows.valid
        if cache is not None and (old := cache.physical_length(layer)):
            key = torch.cat([cache.layers[layer].keys.to(attention.key), attention.key], dim=2)
            attention = dataclasses.replace(attention, key=key)
            before = cache.masks[layer]
            if mask is not None or before is not None:
                ones = torch.ones(one.now.size, old, dtype=torch.bool, device=hidden.device)
                mask = torch.cat([ones if before is None else before.to(hidden.device), rows.held], dim=1)
        return self._read(reading, attention, one.now, mask)

    def _read(self, reading: LLMReading, attention: AttentionCall, batch: Batch, mask: Tensor | None) -> Tensor:
        """[..., B, L] for the rows of the current chunk; mask: as `attention_rows` takes it."""
        queries = _queries(batch, mask)
        learns = self._learns and torch.is_grad_enabled() and reading.differentiable
        with torch.set_grad_enabled(learns), exact(queries.prompt.device):
            return reading.read(attention, queries)[..., -batch.width :]

    def _weigh(self, added: Tensor) -> Tensor:
        """What an MLP adds, times the gains of the rows of the running pass."""
        one = self._passes.current
        return added if one is None or not one.conducted else one.weigh(added)


class LLMRows(dict[tuple[int, LLMReading], Tensor]):
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


def _queries(batch: Batch, mask: Tensor | None) -> QueryRows:
    """What a reading may ask about the rows of the current chunk."""
    rows, valid = batch.rows, batch.rows.held
    assert rows.visual is not None and rows.prompt is not None and rows.text is not None
    prompt = rows.prompt & valid
    last = (torch.arange(batch.width, device=valid.device) * prompt).amax(1, keepdim=True)
    return QueryRows(prompt, rows.visual & valid, rows.text & valid, batch.text_count, last, mask)


def _nothing(attention: AttentionCall) -> None:
    """A tap that makes a module's queries and keys readable ahead."""
