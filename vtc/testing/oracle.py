"""The reference for pruning: the unpruned model with the dropped tokens masked out of attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from vtc import adapters
from vtc.method.base import Positions


class Oracle:
    """Run a model as if tokens had been dropped, without dropping any.

    tables: LLM layer -> [B, S] bool over the input positions, True where a token is still visible from that layer on
    (rows repeat under beams); or a list of them, one for each call that starts a sequence. positions: "compact"
    renumbers the visible tokens from the first table on, "compact_input" those of table 0.
    cached: the same for later calls only, for rows evicted from the cache after the prefill; each table up to the
    layer of the next; [B, H, S] where KV heads keep sets of their own.
    embeddings: [B, S, D] rows to feed instead of the model's own, for methods that merge or pool before the LLM. deep:
    the same of the visual rows that a model adds inside its first layers, one [V, D] per layer.
    replaced: LLM layer -> which input positions [B, S] have other rows [B, S, D] when the prompt enters it, for methods
    that merge inside the LLM. entries: LLM layer -> which entries [B, H, S] of its cache become other keys and values
    [B, H, S, W] after the prefill.
    skips: LLM layer -> [B, S] bool over the input positions, True where a token goes through that one layer; the others
    are not seen in it and leave it as they entered. gains: LLM layer -> [B, S] what multiplies there, of tokens that go
    through, what the MLP adds, of the others the whole row.
    near: LLM layer -> [B, S, S] bool, which input positions each of them may attend to from that layer on, besides what
    the tables and causality say.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: dict[int, Tensor] | Sequence[dict[int, Tensor]],
        *,
        positions: Positions = "preserve",
        cached: dict[int, Tensor] | None = None,
        embeddings: Tensor | None = None,
        deep: Sequence[Tensor] | None = None,
        replaced: dict[int, tuple[Tensor, Tensor]] | None = None,
        entries: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None,
        skips: dict[int, Tensor] | None = None,
        gains: dict[int, Tensor] | None = None,
        near: dict[int, Tensor] | None = None,
    ) -> None:
        adapter = adapters.of(model)
        self.llm, self.layers, self.mrope = adapter.language_model, adapter.layers, adapter.spec.mrope
        self.queue = [tables] if isinstance(tables, dict) else list(tables)
        self.tables, self.cached = self.queue[0], cached or {}
        self.positions, self.embeddings, self.deep, self.replaced = positions, embeddings, deep, replaced or {}
        self.entries = entries or {}
        self.skips, self.gains, self.near = skips or {}, gains or {}, near or {}
        self.mlps = adapter.llm_mlp
        self._mask: Tensor | None = None
        self._past = 0
        self._handles: list[Any] = []

    def __enter__(self) -> Oracle:
        self._handles = [self.llm.register_forward_pre_hook(self._enter, with_kwargs=True)]
        self._handles.append(self.llm.register_forward_hook(self._leave))
        for index, layer in enumerate(self.layers):
            hook = functools.partial(self._layer, index)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if index in self.skips:
                hook = functools.partial(self._around, index)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))
        for index in self.gains:
            self._handles.append(self.mlps[index].register_forward_hook(functools.partial(self._add, index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        self._mask, self._past = kwargs.get("attention_mask"), cache.get_seq_length() if cache is not None else 0
        if self._past == 0:
            self.tables = self.queue.pop(0) if len(self.queue) > 1 else self.queue[0]
        rows = kwargs["inputs_embeds"]
        if self.embeddings is not None and self._past == 0:
            full = self.embeddings.repeat_interleave(rows.shape[0] // self.embeddings.shape[0], 0)
            rows = torch.cat([full.to(rows.dtype), rows[:, full.shape[1] :]], dim=1)
            kwargs["inputs_embeds"] = rows
        if self.deep is not None and self._past == 0:
            kwargs["deepstack_visual_embeds"] = list(self.deep)
        return args, kwargs

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if self._past == 0 and output.past_key_values is not None:
            for index, (where, keys, values) in self.entries.items():
                layer = output.past_key_values.layers[index]
                layer.keys = torch.where(where[..., None], keys, layer.keys)
                layer.values = torch.where(where[..., None], values, layer.values)

    def _layer(self, index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index in self.replaced and self._past == 0:
            hidden = self._replace(hidden, *self.replaced[index])
            args, kwargs = (hidden, *args[1:]), {name: kwargs[name] for name in kwargs if name != "hidden_states"}
        batch, queries, _ = hidden.shape
        keys = self._past + queries
        visible = torch.ones(batch, keys, dtype=torch.bool)
        if self._mask is not None:
            visible = self._mask[:, :keys].bool()
        entering = self.positions == "compact_input"
        numbered = self._hide(visible, self.tables, 0 if entering else index)
        if index in self.skips:
            visible = self._hide(visible, {index: self.skips[index]}, index)
            numbered = numbered if entering else self._hide(visible, self.tables, index)
        visible = self._hide(visible, self.tables, index)[:, None]
        if self._past and (evicted := [start for start in self.cached if start <= index]):
            visible = self._hide_heads(visible, self.cached[max(evicted)])
        causal = torch.arange(keys) <= torch.arange(queries)[:, None] + self._past
        mask = causal & visible[:, :, None]
        if self._past == 0 and (limited := [start for start in self.near if start <= index]):
            near = self.near[max(limited)]
            width = min(keys, near.shape[1])
            near = near[:, None, :width, :width].repeat_interleave(batch // near.shape[0], 0)
            mask[..., :width, :width] &= near
        if self.llm.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        kwargs["attention_mask"] = mask
        acting = {*self.tables, *self.skips}
        first = 0 if entering else min(acting, default=len(self.layers))
        if self.positions != "preserve" and first in acting and index >= first:
            numbers = (numbered.long().cumsum(1) - 1).clamp(min=0)[:, -queries:]
            numbers = numbers[None].expand(3, -1, -1) if self.mrope else numbers
            kwargs["position_embeddings"] = self.llm.rotary_emb(hidden, numbers)
        return args, kwargs

    def _add(self, index: int, module: Any, args: Any, output: Any) -> Any:
        if self._past:
            return output
        rows = output[0] if isinstance(output, tuple) else output
        rows = self._weighed(rows, index)
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    def _weighed(self, rows: Tensor, index: int) -> Tensor:
        """[B, L, D] times the gains of the layer, of tokens behind the prompt as they are."""
        if index not in self.gains:
            return rows
        gains = self.gains[index].repeat_interleave(rows.shape[0] // self.gains[index].shape[0], 0)
        return rows * torch.nn.functional.pad(gains, (0, rows.shape[1] - gains.shape[1]), value=1)[..., None]

    def _around(self, index: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self._past:
            return output
        table, before = self.skips[index], self._weighed(args[0] if args else kwargs["hidden_states"], index)
        rows = output[0] if isinstance(output, tuple) else output
        rows = self._replace(rows, ~table, before[:: before.shape[0] // table.shape[0], : table.shape[1]])
        return (rows, *output[1:]) if isinstance(output, tuple) else rows

    @staticmethod
    def _replace(hidden: Tensor, where: Tensor, rows: Tensor) -> Tensor:
        beams, length = hidden.shape[0] // rows.shape[0], rows.shape[1]
        where, rows = where.repeat_interleave(beams, 0), rows.repeat_interleave(beams, 0)
        changed = torch.where(where[..., None], rows, hidden[:, :length])
        return torch.cat([changed, hidden[:, length:]], dim=1)

    @staticmethod
    def _hide(visible: Tensor, tables: dict[int, Tensor], layer: int) -> Tensor:
        visible = visible.clone()
        for start, table in tables.items():
            if layer >= start:
                table = table.repeat_interleave(visible.shape[0] // table.shape[0], 0)
                width = min(visible.shape[1], table.shape[1])
                visible[:, :width] &= table[:, :width]
        return visible

    def _hide_heads(self, visible: Tensor, table: Tensor) -> Tensor:
        """[B, 1, K] and a table [B, S] or [B, H, S] -> [B, 1, K] or, for all query heads, [B, Hq, K]."""
        table = table if table.ndim == 3 else table[:, None]
        if table.shape[1] > 1:  # neighbouring query heads share a KV head
            table = table.repeat_interleave(self.llm.config.num_attention_heads // table.shape[1], 1)
        table = table.repeat_interleave(visible.shape[0] // table.shape[0], 0)
        return visible & torch.nn.functional.pad(table, (0, visible.shape[2] - table.shape[2]), value=True)
