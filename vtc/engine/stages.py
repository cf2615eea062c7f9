"""Running a method's stages inside a call: build the view, ask the method, carry out what it selected."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.adapters.compat import checkpoints
from vtc.batch.context import VisionContext
from vtc.batch.rows import Batch
from vtc.engine.blocks import BlockHooks
from vtc.engine.eviction import Kept, alive, evict, reader, replaced, stay
from vtc.engine.llm_pass import LLMPass
from vtc.engine.pairs import Pair
from vtc.engine.passes import Passes
from vtc.engine.taps import TapSet, look_ahead
from vtc.engine.tower_stages import TowerStages
from vtc.engine.unread import refuse_unread
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import CacheStage, Compressor, EncoderStage, Plan, Selection, Stage, StageView
from vtc.method.budget import Budget, ItemBudgets
from vtc.method.readings import AttentionCall, BlockReading, LLMReading, QueryRows, exact
from vtc.method.states import States


class StageRunner:
    """One method's stages on one model.

    inner: LLM layers before which it acts, 0 included. skips: those of them that tokens skip and nothing more. starts:
    first layer of every group of layers that hold the same rows. cache: its stages after the prefill. encoder: its
    stages inside the vision encoder. noted: stages under which a trace lists what is left; what the encoder dropped
    shows at 0.
    """

    def __init__(
        self,
        adapter: Adapter,
        method: Compressor,
        plan: Plan,
        budget: Budget | ItemBudgets | None,
        module: nn.Module | None = None,
        pairs: Sequence[Pair] = (),
    ) -> None:
        self.adapter, self.method, self.plan, self.budget, self.spec = adapter, method, plan, budget, adapter.spec
        self.module, self.pairs = module, pairs
        self.learns = module is not None and any(weight.requires_grad for weight in module.parameters())
        self.inner = sorted(stage for stage in plan.stages if isinstance(stage, int))
        after = [stage for stage in plan.stages if isinstance(stage, CacheStage)]
        self.cache = sorted(after, key=lambda stage: stage.from_layer)
        bounds = [*self.inner, *(stage.from_layer for stage in after)]
        layers = self.spec.llm_layers
        self.skips = frozenset(plan.skips)
        wrong = sorted(layer for layer in self.skips if layer < 1 or layer not in self.inner)
        if wrong or (self.skips and after):
            what = f"LLM layer {wrong[0]}, before which it has no stage" if wrong else "a layer and acts on the cache"
            raise UnsupportedMethod(
                f"tokens of {method.name!r} skip {what}; let them skip layers from 1 on that are stages of the plan, "
                "without stages after the prefill"
            )
        beyond = [layer for layer in [*bounds, *plan.needs.llm] if not 0 <= layer < layers]
        if beyond:
            raise UnsupportedMethod(
                f"{method.name!r} acts at or reads LLM layer {beyond[0]}; this {self.spec.family} model has layers 0 "
                f"to {layers - 1}; choose among them"
            )
        behind = (layer + 1 for layer in self.skips if layer + 1 < layers)
        self.starts = tuple(sorted({0, *bounds, *behind}))
        inside = [stage for stage in plan.stages if isinstance(stage, EncoderStage)]
        alike = budget.alike(method.name) if inside and budget is not None else None
        self.encoder = TowerStages(adapter, method, plan, alike, module) if inside else None
        self.noted: list[Stage] = [*sorted({*self.inner, *([0] if inside else [])}), *self.cache]

    def taps(self, passes: Passes[LLMPass]) -> TapSet:
        """Taps for the LLM rows the plan needs, which note them in the pass they belong to."""
        attention = self.adapter.llm_attention
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
        record = functools.partial(self._record, passes)
        return TapSet(
            (attention[layer], _nothing if one.ahead else functools.partial(record, layer, one))
            for layer, one in pairs
            if not isinstance(one, BlockReading)
        )

    def hooks(self, passes: Passes[LLMPass]) -> BlockHooks:
        """Hooks for what the plan needs of the blocks of LLM layers, and for gains of rows there."""
        pairs = [(layer, one) for layer, one in self.plan.needs.llm_pairs if isinstance(one, BlockReading)]
        record, weigh = functools.partial(self._record_block, passes), functools.partial(_weigh, passes)
        return BlockHooks(self.adapter, pairs, record, self.plan.skips if self.plan.gains else (), weigh)

    def _reader(self, passes: Passes[LLMPass], layer: int) -> LLMPass | None:
        """The pass that notes what layer `layer` does now, None where nobody does."""
        one = passes.current
        if one is None or not one.conducted or one.now.items is None:
            return None
        return one if self.method.reads(self.spec, layer, one.memory) else None

    def _record_block(
        self, passes: Passes[LLMPass], layer: int, reading: BlockReading, block: int, before: Tensor, after: Tensor
    ) -> None:
        """Read what a block, 0 for attention and 1 for MLP, made of the rows."""
        one = self._reader(passes, layer)
        if one is None:
            return
        batch, key = one.now, (layer, reading)
        with torch.no_grad(), exact(before.device):
            found = reading.changed(before, after, _queries(batch, batch.rows.valid))[None]
        found = torch.cat([batch.rows.extra[key], found]) if block else found
        one.batch = dataclasses.replace(batch, rows=batch.rows.note(key, found))

    def _record(self, passes: Passes[LLMPass], layer: int, reading: LLMReading, attention: AttentionCall) -> None:
        """Read an attention call, keep what concerns the rows of the current chunk."""
        one = self._reader(passes, layer)
        if one is None:
            return
        mask, batch = attention.mask, one.now
        if not isinstance(mask, Tensor):  # no mask, or a block mask: the group's own validity and causality say so too
            mask = batch.rows.valid if one.cache is None else one.cache.masks[one.group]
        found = _read(reading, attention, batch, mask, graph=self.learns)
        one.batch = dataclasses.replace(batch, rows=batch.rows.note((layer, reading), found))

    def _read_ahead(self, layer: int, reading: LLMReading, one: LLMPass, hidden: Tensor) -> Tensor:
        """[..., B, L] what `reading` says of layer `layer`, which `hidden` is about to enter."""
        with torch.no_grad():
            given = self.adapter.attention_input(layer, hidden)
            attention = look_ahead(self.adapter.llm_attention[layer], given, one.rotary)
        rows, cache = one.now.rows, one.cache
        mask = rows.valid
        if cache is not None and (old := cache.physical_length(layer)):
            key = torch.cat([cache.layers[layer].keys.to(attention.key), attention.key], dim=2)
            attention = dataclasses.replace(attention, key=key)
            before = cache.masks[layer]
            if mask is not None or before is not None:
                ones = torch.ones(one.now.size, old, dtype=torch.bool, device=hidden.device)
                mask = torch.cat([ones if before is None else before.to(hidden.device), rows.held], dim=1)
        return _read(reading, attention, one.now, mask, graph=self.learns)

    def check_checkpointing(self) -> None:
        """Raise UnsupportedCall where recomputed layers would lack gradients of what was read of them, or gains."""
        trains = self.learns and any(reading.differentiable for _, reading in self.plan.needs.llm_pairs)
        if (trains or self.plan.gains) and checkpoints(self.adapter.language_model):
            what = "trains on what it reads of LLM layers" if trains else "weighs what the MLPs of LLM layers add"
            raise UnsupportedCall(
                f"{self.method.name!r} {what}, and gradient checkpointing recomputes these without it; switch "
                "checkpointing off: model.gradient_checkpointing_disable()"
            )

    def keeps_all(self, batch: Batch, contexts: Sequence[VisionContext]) -> bool:
        """True when the budget keeps every token of every item: then the model must stay untouched, bit for bit."""
        assert batch.items is not None
        if any(context.alive is not None for context in contexts):
            return False
        counts = batch.items.input_counts
        budgets = [None] * len(counts) if self.budget is None else self.budget.each(batch.items.sources)
        return all(map(self.method.keeps_all, budgets, counts))

    def run(self, stage: int, one: LLMPass, states: States) -> Tensor:
        """Pass `stage`: [B, L, D] rows in, [B, L', D] rows out."""
        if stage == 0:
            states = _drop_encoded(one, states)
            one.enter_llm()
        selection = None
        if stage in self.inner:
            selection = self.select(stage, one, states)
            one.staged = True
        if selection is not None:
            if selection.gains is not None and not (self.plan.gains and stage in self.skips):
                raise UnsupportedCall(
                    f"gains were given at stage {stage}, where the plan of {self.method.name!r} has none; they are for "
                    f"layers that tokens may skip: Plan(..., skips=({stage or 1},), gains=True)"
                )
            carry_out = one.set_aside if stage in self.skips else one.apply
            states = States(carry_out(stage, selection, states))
        elif stage in self.noted:
            one.note(stage)
        if stage == 0:
            one.enter_llm()
        return states.all()

    def select(self, stage: Stage, one: LLMPass, states: States) -> Selection | None:
        """Ask the method what to keep."""
        batch, device = one.now, states.device
        rows, valid = batch.rows, batch.rows.held
        assert batch.items is not None and batch.separators is not None
        assert rows.visual is not None and rows.prompt is not None and rows.text is not None
        keys = torch.cat([context.fingerprint.to(device) for context in one.contexts])
        recorded = {key: values for key, values in rows.extra.items() if isinstance(key, tuple)}
        view = StageView(
            stage=stage,
            model=self.spec,
            budget=self.budget,
            items=batch.items,
            separators=batch.separators,
            states=states,
            visual=rows.visual & valid,
            valid=valid,
            prompt=rows.prompt & valid,
            text=rows.text & valid,
            fingerprint=keys[batch.items.source],
            vision_rows={
                pair: _stack([context.attention[pair].to(device) for context in one.contexts])
                for pair in self.plan.needs.vision_pairs
            },
            unpooled=_unpooled(one.contexts, device) if self.plan.needs.unpooled else None,
            llm_rows=_LLMRows(recorded, lambda layer, reading: self._read_ahead(layer, reading, one, states.all())),
            needs=self.plan.needs,
            pairs={pair.name: pair.features(one, device) for pair in self.pairs},
            memory=one.memory,
            module=self.module,
            final_norm=self.adapter.final_norm,
            cached=reader(stage.from_layer, one) if isinstance(stage, CacheStage) else None,
        )
        with exact(device):
            selection = self.method.select(view)
        if selection is not None:
            refuse_unread(selection, stage)
        return selection

    def evict(self, one: LLMPass, hidden: Tensor) -> None:
        """After the prefill: drop the cached rows of tokens the method gives up.

        Synchronises once, and once for each stage whose selection leaves its counts open.
        """
        if one.cache is None or not self.cache:
            return
        one.batch = one.now.to(hidden.device)
        states, kept = States(hidden), dict[int, Kept]()
        ends = [*(stage.from_layer for stage in self.cache[1:]), self.spec.llm_layers]
        for stage, end in zip(self.cache, ends, strict=True):
            selection = self.select(stage, one, states)
            if selection is None:
                one.note(stage)
                continue
            left, totals = alive(selection, one)
            one.note(stage, left if selection.keep.ndim == 3 else left[:, 0])
            for group in [start for start in self.starts if stage.from_layer <= start < end]:
                what = stay(left, group, one, one.cache)
                kept[group] = replaced(selection, what, end - stage.from_layer, group, one)
                one.evicted[group] = totals
        evict(one.cache, kept)


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


def _read(reading: LLMReading, attention: AttentionCall, batch: Batch, mask: Tensor | None, *, graph: bool) -> Tensor:
    """[..., B, L] for the rows of the current chunk; mask: as `attention_rows` takes it. graph: something learns."""
    queries = _queries(batch, mask)
    learns = graph and torch.is_grad_enabled() and reading.differentiable
    with torch.set_grad_enabled(learns), exact(queries.prompt.device):
        return reading.read(attention, queries)[..., -batch.width :]


def _queries(batch: Batch, mask: Tensor | None) -> QueryRows:
    """What a reading may ask about the rows of the current chunk."""
    rows, valid = batch.rows, batch.rows.held
    assert rows.visual is not None and rows.prompt is not None and rows.text is not None
    prompt = rows.prompt & valid
    last = (torch.arange(batch.width, device=valid.device) * prompt).amax(1, keepdim=True)
    return QueryRows(prompt, rows.visual & valid, rows.text & valid, batch.text_count, last, mask)


def _weigh(passes: Passes[LLMPass], added: Tensor) -> Tensor:
    """What an MLP adds, times the gains of the rows of the running pass."""
    one = passes.current
    return added if one is None or not one.conducted else one.weigh(added)


def _nothing(attention: AttentionCall) -> None:
    """A tap that makes a module's queries and keys readable ahead."""


def _drop_encoded(one: LLMPass, states: States) -> States:
    """Remove the tokens whose patches an encoder stage dropped."""
    items = one.now.items
    if items is None or all(context.alive is None for context in one.contexts):
        return states
    marks: list[Tensor] = []
    counts: list[int] = []
    for context in one.contexts:
        sizes = tuple(item.selectable for item in context.items)
        width = max(item.n_tokens for item in context.items)
        mark, kept = context.alive or (torch.ones(len(sizes), width, dtype=torch.bool), sizes)
        marks.append(mark.to(states.device))
        counts += kept
    alive = _stack(marks)[items.source].gather(1, items.token)
    return States(one.apply(0, Selection(alive, counts=[counts[source] for source in items.sources]), states))


def _unpooled(contexts: Sequence[VisionContext], device: torch.device) -> tuple[Tensor, tuple[int, ...]] | None:
    """[S, P, D] what the projector made of the patches of every source, and how many they are: 0 if none are pooled."""
    given = [context.unpooled for context in contexts if context.unpooled is not None]
    if not given:
        return None
    none = given[0][:1, :0]
    rows = [none.expand(len(c.items), -1, -1) if c.unpooled is None else c.unpooled for c in contexts]
    return _stack([each.to(device) for each in rows]), tuple(each.shape[1] for each in rows for _ in each)


def _stack(parts: list[Tensor]) -> Tensor:
    """[I_c, N_c, ...] tables of several contexts as one [I, N, ...], zero-padded."""
    width = max(part.shape[1] for part in parts)
    flat = (0, 0) * (parts[0].ndim - 2)
    return torch.cat([torch.nn.functional.pad(part, (*flat, 0, width - part.shape[1])) for part in parts])
