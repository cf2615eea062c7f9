"""The oracle for what a method did: what entered the LLM, and what became of the cache, as the engine was told."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtc import adapters
from vtc.batch.trace import CallRecord
from vtc.engine.handle import Handle
from vtc.method.base import CacheStage, EncoderStage, Selection, StageView
from vtc.method.items import ItemTable
from vtc.testing.between import Select, stand_between
from vtc.testing.oracle import Oracle


@dataclass
class Entered:
    """What a language model was first given: rows that enter layer 0 and those at which a method acts, by layer; deep:
    visual rows that it adds behind its first layers, of all calls. anew: stages that replace every row they keep.
    gains: of tokens at first, by layer, behind the items they belong to; entries: likewise what replaced entries of
    caches.
    """

    rows: dict[int, Tensor] = field(default_factory=dict)
    anew: set[int] = field(default_factory=set)
    gains: dict[int, tuple[ItemTable, Tensor]] = field(default_factory=dict)
    entries: dict[int, tuple[ItemTable, Selection]] = field(default_factory=dict)
    deep: list[Any] = field(default_factory=list)


@contextmanager
def entering(model: Any, handle: Handle) -> Iterator[Entered]:
    """Inside, note it."""
    adapter, seen = adapters.of(model), Entered()

    def rows(layer: int, module: Any, args: Any, kwargs: Any) -> None:
        seen.rows.setdefault(layer, args[0] if args else kwargs["hidden_states"])

    def whole(module: Any, args: Any, kwargs: Any) -> None:
        seen.deep.append(kwargs.get("deepstack_visual_embeds"))

    def noted(select: Select, view: StageView) -> Selection | None:
        selection = select(view)
        if isinstance(view.stage, CacheStage) and selection is not None and selection.entries is not None:
            seen.entries.setdefault(view.stage.from_layer, (view.items, selection))
        if isinstance(view.stage, int) and selection is not None and selection.tokens is not None:
            seen.anew |= {view.stage} if selection.merged_into is None else set()
        if isinstance(view.stage, int) and selection is not None and selection.gains is not None:
            seen.gains.setdefault(view.stage, (view.items, selection.gains))
        return selection

    stand_between(handle, noted)
    stages = {0, *(stage for stage in handle.plan.stages if isinstance(stage, int))}
    hooks = [
        adapter.layers[stage].register_forward_pre_hook(functools.partial(rows, stage), with_kwargs=True)
        for stage in stages
    ]
    hooks.append(adapter.language_model.register_forward_pre_hook(whole, with_kwargs=True, prepend=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def reference(model: Any, handle: Handle, seen: Entered | None = None) -> Oracle:
    """The oracle for what `handle` traced, call by call. seen: what entered the LLM then, for changed features."""
    skips = handle.plan.skips
    tables = [
        {k: v for k, v in record.keep.items() if isinstance(k, int) and k not in skips} for record in handle.trace
    ]
    first, embeddings, deep, replaced = handle.trace[0], None, None, {}
    cached = {k.from_layer: first.heads.get(k, v) for k, v in first.keep.items() if isinstance(k, CacheStage)}
    inside = any(isinstance(stage, EncoderStage) for stage in handle.plan.stages)
    seen = seen or Entered()
    for stage, entered in seen.rows.items():
        if not (inside and stage == 0) and not any(stage in item.merged_into for item in first.items):
            continue
        keep = first.keep[stage]
        full = entered.new_zeros(*keep.shape, entered.shape[-1])
        for row in range(keep.shape[0]):
            full[row, keep[row]] = entered[row, entered.shape[1] - int(keep[row].sum()) :]
        if stage == 0:
            embeddings = full
            continue
        merged = torch.zeros_like(keep)
        for item in first.items:  # every token that absorbed another one, or that is there
            into = item.merged_into.get(stage, item.positions[:0])
            other = stage in seen.anew or into != torch.arange(len(into), device=into.device)
            others = into[(into >= 0) & other]
            merged[item.row, item.positions[others]] = True
        replaced[stage] = merged, full
    if inside and seen.deep:
        deep = seen.deep[0]
    entries = {layer: _over_input(*each, first.keep[CacheStage(layer)]) for layer, each in seen.entries.items()}
    return Oracle(
        model,
        tables,
        positions=handle.positions,
        cached=cached,
        embeddings=embeddings,
        deep=deep,
        replaced=replaced,
        entries=entries,
        skips={layer: first.keep[layer] for layer in skips},
        gains={layer: _gains(*each, first.keep[layer]) for layer, each in seen.gains.items()},
        near=_near(first),
    )


def _near(record: CallRecord) -> dict[int, Tensor]:
    """Stage inside the LLM -> [B, S, S] bool, which positions see each other where it limits that of visual ones."""
    found = {}
    for stage in {stage for item in record.items for stage in item.near if isinstance(stage, int)}:
        rows, length = record.keep[stage].shape
        visual, near = torch.zeros(rows, length).bool(), torch.eye(length).bool().repeat(rows, 1, 1)
        for item in record.items:
            at, places = item.positions, item.near[stage]
            visual[item.row, at] = True
            close = ((places[:, None] - places[None]).abs() <= 1).all(-1)
            near[item.row, at[:, None], at] |= close
        found[stage] = near | ~visual[:, :, None] | ~visual[:, None]
    return found


def _gains(items: ItemTable, gains: Tensor, alive: Tensor) -> Tensor:
    """[B, S] gains of the items' tokens, 1 elsewhere; alive: [B, S]."""
    full = torch.ones(alive.shape)
    for item, (row, count) in enumerate(zip(items.rows, items.counts, strict=True)):
        full[row, items.positions[item, items.token[item, :count]]] = gains[item, :count].float()
    return full


def _over_input(items: ItemTable, selection: Selection, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the entries [B, H, S] of a cache that drops nothing are replaced, and their keys and values.

    alive: [B, S].
    """
    assert selection.entries is not None
    count, heads = selection.entries[0].shape[:2]
    keep = selection.by_head.expand(-1, heads, -1)
    where = torch.zeros(len(alive), heads, alive.shape[1], dtype=torch.bool)
    full = [each.new_zeros(*where.shape, each.shape[3]) for each in selection.entries]
    for item in range(count):
        row, position = items.rows[item], items.positions[item]
        for head in range(heads):
            for place in range(items.counts[item]):
                at = row, head, position[items.token[item, place]]
                where[at] = keep[item, head, place]
                for values, each in zip(full, selection.entries, strict=True):
                    values[at] = each[item, head, place]
    return where, full[0], full[1]
