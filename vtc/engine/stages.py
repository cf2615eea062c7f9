"""Running a method's stages inside a call: build the view, ask the method, carry out what it selected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtc.adapters.base import Adapter
from vtc.batch.context import VisionContext
from vtc.batch.rows import Batch
from vtc.engine.eviction import Kept, alive, evict, reader, replaced, stay
from vtc.engine.llm_pass import LLMPass
from vtc.engine.llm_recorder import LLMRecorder
from vtc.engine.pairs import Pair
from vtc.engine.tower_stages import TowerStages
from vtc.engine.unread import refuse_unread
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import CacheStage, Compressor, EncoderStage, ModelSpec, Plan, Selection, Stage, StageView
from vtc.method.budget import Budget, ItemBudgets
from vtc.method.readings import exact
from vtc.method.states import States


def check_plan(method: Compressor, plan: Plan, model: ModelSpec) -> None:
    """Raise UnsupportedMethod for layers that the model does not have, and for layers that cannot be skipped."""
    inner = [stage for stage in plan.stages if isinstance(stage, int)]
    after = [stage.from_layer for stage in plan.stages if isinstance(stage, CacheStage)]
    wrong = sorted(layer for layer in plan.skips if layer < 1 or layer not in inner)
    if wrong or (plan.skips and after):
        what = f"LLM layer {wrong[0]}, before which it has no stage" if wrong else "a layer and acts on the cache"
        raise UnsupportedMethod(
            f"tokens of {method.name!r} skip {what}; let them skip layers from 1 on that are stages of the plan, "
            "without stages after the prefill"
        )
    beyond = [layer for layer in [*sorted(inner), *after, *plan.needs.llm] if not 0 <= layer < model.llm_layers]
    if beyond:
        raise UnsupportedMethod(
            f"{method.name!r} acts at or reads LLM layer {beyond[0]}; this {model.family} model has layers 0 to "
            f"{model.llm_layers - 1}; choose among them"
        )


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
        module: nn.Module | None,
        pairs: Sequence[Pair],
        recorder: LLMRecorder,
    ) -> None:
        self.adapter, self.method, self.plan, self.budget, self.spec = adapter, method, plan, budget, adapter.spec
        self.module, self.pairs, self.recorder = module, pairs, recorder
        self.inner = sorted(stage for stage in plan.stages if isinstance(stage, int))
        after = [stage for stage in plan.stages if isinstance(stage, CacheStage)]
        self.cache = sorted(after, key=lambda stage: stage.from_layer)
        bounds = [*self.inner, *(stage.from_layer for stage in after)]
        self.skips = frozenset(plan.skips)
        behind = (layer + 1 for layer in self.skips if layer + 1 < self.spec.llm_layers)
        self.starts = tuple(sorted({0, *bounds, *behind}))
        inside = [stage for stage in plan.stages if isinstance(stage, EncoderStage)]
        alike = budget.alike(method.name) if inside and budget is not None else None
        self.encoder = TowerStages(adapter, method, plan, alike, module) if inside else None
        self.noted: list[Stage] = [*sorted({*self.inner, *([0] if inside else [])}), *self.cache]

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
            llm_rows=self.recorder.rows(one, states.all),
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
