"""A KV cache whose layers hold fewer tokens than the sequence has seen."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from vtc.engine.maker import Maker
from vtc.errors import UnsupportedCall

BROKEN = (
    "a forward pass over this KV cache was interrupted (Ctrl-C, or the method was detached while it ran), so its "
    "layers may hold different tokens; start a new cache"
)


@dataclass(frozen=True, eq=False)
class _Before:
    """A cache before a forward pass: tokens seen, rows of each group's layers, masks and shifts."""

    seen: int
    rows: dict[int, int]
    masks: dict[int, Tensor | None]
    shifts: dict[int, Tensor | None]


class CompressedCache(DynamicCache):
    """A DynamicCache that answers lengths in logical tokens and mask geometry in physical ones.

    `get_seq_length` counts every token of the original sequence, because generate() slices its input by it and models
    derive position ids from it. `get_mask_sizes` and `get_query_offset` count the rows a layer really holds.

    Layers form groups that begin at `starts`. Per group, `masks` holds the [B, rows] validity of its rows (None when
    all are valid) and `shifts` the [B, 1] distance between original and renumbered positions (None under `preserve`).

    maker: what fills it. open: a forward pass is writing. before: what `restore` goes back to, None once rows were
    evicted. broken: a forward pass ended without a sign, so that layers may hold different tokens.
    """

    seen: int
    starts: tuple[int, ...]
    masks: dict[int, Tensor | None]
    shifts: dict[int, Tensor | None]
    open: bool
    broken: bool
    maker: Maker | None
    before: _Before | None

    @classmethod
    def adopt(
        cls, cache: Any, starts: Sequence[int], mask: Tensor | None, maker: Maker | None = None
    ) -> CompressedCache:
        """Turn a plain DynamicCache into a compressed one in place, so that callers who hold it see it filled.

        starts: first layer of each group. mask: [B, rows] validity of what the cache already holds, None if all valid.
        maker: what will fill it; a cache that something else has filled is refused, unless nothing was seen yet.
        """
        if isinstance(cache, cls) and not cache.seen and not cache.broken:
            cache._set(starts, None, maker)
            return cache
        if isinstance(cache, cls):
            if cache.broken:
                raise UnsupportedCall(BROKEN)
            if cache.starts != tuple(starts):
                raise UnsupportedCall(
                    f"this KV cache was compressed at layers {cache.starts}, the attached method acts at "
                    f"{tuple(starts)}; "
                    "continue it with the same method or start a new cache"
                )
            if cache.maker != maker:
                raise UnsupportedCall(
                    f"this KV cache was filled by {cache.maker}, the attached method is {maker}; continue it with the "
                    "settings that filled it, or start a new cache"
                )
            return cache
        check_plain(cache)
        seen = cache.get_seq_length()
        cache.__class__ = cls
        cache.seen, cache.open, cache.broken, cache.before = seen, False, False, None
        cache._set(starts, mask if seen else None, maker)
        return cache  # type: ignore[no-any-return]

    def _set(self, starts: Sequence[int], mask: Tensor | None, maker: Maker | None) -> None:
        self.starts, self.maker = tuple(starts), maker
        self.masks = dict.fromkeys(starts, mask)
        self.shifts = dict.fromkeys(starts)

    # --- one forward pass
    def begin(self) -> None:
        """Open for a forward pass."""
        rows = {start: self.physical_length(start) for start in self.starts}
        self.before = _Before(self.seen, rows, dict(self.masks), dict(self.shifts))
        self.open = True

    def end(self) -> None:
        """The forward pass has written every layer."""
        self.open, self.before = False, None

    def interrupt(self) -> None:
        """The forward pass ended nobody knows where: refuse to go on."""
        if self.open:
            self.open, self.before, self.broken = False, None, True

    def restore(self, *, plain: bool) -> None:
        """Back to what it was before the forward pass, which raised; plain: to a plain cache."""
        before = self.before
        if before is None:
            return self.interrupt()
        self.open, self.before = False, None
        self.seen, self.masks, self.shifts = before.seen, before.masks, before.shifts
        for start, end in itertools.pairwise([*self.starts, max(len(self.layers), *self.starts)]):
            for layer in self.layers[start:end]:
                _shorten(layer, before.rows[start])
        if plain:
            for name in ("seen", "starts", "open", "broken", "masks", "shifts", "maker", "before"):
                delattr(self, name)
            self.__class__ = DynamicCache

    def physical_length(self, layer_idx: int = 0) -> int:
        """Rows that layer `layer_idx` holds, padding included."""
        return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical tokens seen, the same for every layer."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Physical rows in front of the next query."""
        return self.physical_length(layer_idx)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; refused unless an engine conducts the call."""
        if not self.open:
            raise UnsupportedCall(
                BROKEN
                if self.broken
                else f"this KV cache was filled with compressed visual tokens by {self.maker}; attach the same method "
                "again to continue it"
            )
        return super().update(*args, **kwargs)  # type: ignore[no-any-return]

    def extend(self, group: int, chunk: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
        """Note the validity of `length` rows about to be appended to `group`; returns its [B, rows] mask or None."""
        old = self.masks[group]
        if old is None and chunk is None:
            return None
        if old is None:
            old = torch.ones(batch, self.physical_length(group), dtype=torch.bool, device=device)
        if chunk is None:
            chunk = torch.ones(batch, length, dtype=torch.bool, device=device)
        self.masks[group] = torch.cat([old.to(device), chunk.to(device)], dim=1)
        return self.masks[group]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams: keys, values, masks and shifts."""
        super().reorder_cache(beam_idx)
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        super().batch_select_indices(indices)
        self._map(lambda t: t[indices.to(t.device)])

    def crop(self, max_length: int) -> None:
        """Remove the last tokens; only a negative count is defined, since logical and physical lengths differ."""
        if max_length > 0:
            raise UnsupportedCall(
                f"crop({max_length}) on a compressed cache; pass a negative count of tokens to remove"
            )
        if max_length == 0:
            return
        super().crop(max_length)
        self.seen += max_length
        self.masks = {group: None if mask is None else mask[:, :max_length] for group, mask in self.masks.items()}

    def reset(self) -> None:
        """Forget everything that was seen."""
        super().reset()
        for layer in self.layers:  # older versions only zero the rows
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.seen, self.broken = 0, False
        self.masks = dict.fromkeys(self.starts)
        self.shifts = dict.fromkeys(self.starts)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.masks = {group: None if mask is None else change(mask) for group, mask in self.masks.items()}
        self.shifts = {group: None if shift is None else change(shift) for group, shift in self.shifts.items()}


def _shorten(layer: Any, rows: int) -> None:
    """Keep a layer's first `rows` rows."""
    if not layer.is_initialized:
        return
    if rows:
        layer.keys, layer.values = layer.keys[:, :, :rows], layer.values[:, :, :rows]
    else:
        layer.keys = layer.values = None
        layer.is_initialized = False


def check_plain(cache: Any) -> None:
    """Raise UnsupportedCall unless `cache` is a DynamicCache of plain full-attention layers on one device."""
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not plain or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", [])})
        raise UnsupportedCall(
            f"compression needs a plain DynamicCache with full-attention layers, got {type(cache).__name__} with "
            f"layers {kinds}; drop cache_implementation (static, quantized and offloaded caches are not supported)"
        )
