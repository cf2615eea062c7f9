"""What a method does to the KV cache after the prefill: rows leave, head by head where it says so, others change."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.batch.rows import Batch, RowTable
from vtc.engine.cache import CompressedCache
from vtc.engine.llm_pass import LLMPass
from vtc.errors import UnsupportedMethod
from vtc.method.base import Selection
from vtc.method.items import ItemTable
from vtc.ops.host import put
from vtc.ops.select import front_pack, left_pack


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays in the caches of a group of layers.

    rows: [B, H, rows] bool over physical rows; H is 1 where all KV heads keep the same. entries: keys and values
    [I, H, K, W] in the place of those that the flattened cache [B * H * rows] has at `place` [I, H, K]; what lies one
    behind its end is nowhere.
    """

    rows: Tensor
    place: Tensor | None = None
    entries: tuple[Tensor, Tensor] | None = None


def alive(selection: Selection, one: LLMPass) -> tuple[Tensor, tuple[int, ...]]:
    """What a selection leaves in the caches: [B, H, S] bool over input positions, text included, H as in `Kept`.

    Beside it the visual tokens left in each batch row. Synchronises where the selection leaves its counts open.
    """
    batch = one.now
    items, held = batch.items, batch.rows.held
    assert items is not None
    kept = (selection.by_head & items.mask[:, None]).transpose(1, 2)
    left = batch.over_input(items.scatter(kept, held[..., None].expand(-1, -1, kept.shape[2]))).transpose(1, 2)
    counts = kept.sum(1).amax(1).tolist() if selection.counts is None else selection.counts
    return left, tuple(dataclasses.replace(items, counts=tuple(counts)).row_totals(batch.size))


def stay(left: Tensor, group: int, one: LLMPass, cache: CompressedCache) -> Kept:
    """What stays in the caches of `group` when of the input `left` [B, H, S] does; earlier calls' rows all stay."""
    rows = one.left[group].to(left.device)
    chunk = left.gather(2, rows.source[:, None].expand(-1, left.shape[1], -1))
    chunk = chunk if rows.valid is None else chunk & rows.valid[:, None]
    old = cache.physical_length(group) - chunk.shape[2]
    return Kept(torch.cat([chunk.new_ones(*chunk.shape[:2], old), chunk], dim=2))


def replaced(selection: Selection, kept: Kept, layers: int, group: int, one: LLMPass) -> Kept:
    """With the entries that a selection about `layers` layers from `group` on puts in the place of those it keeps.

    Raises UnsupportedMethod where these are several layers.
    """
    if selection.entries is None:
        return kept
    if layers > 1:
        raise UnsupportedMethod(
            f"Selection.entries were given for the caches of {layers} layers from {group} on, which hold different "
            "ones; plan a CacheStage for every layer"
        )
    heads, length = selection.entries[0].shape[1], kept.rows.shape[2]
    items = _in_cache(one.now, one.left[group], length)
    keep = (selection.by_head & items.mask[:, None]).expand(-1, heads, -1)
    most = keep.shape[2] if selection.counts is None else max(selection.counts)
    order = front_pack(keep.flatten(0, 1), most).view(*keep.shape[:2], most)
    head = items.row[:, None] * heads + torch.arange(heads, device=keep.device)
    place = head[..., None] * length + items.index[:, None].expand_as(keep).gather(2, order)
    place = torch.where(keep.gather(2, order), place, one.now.size * heads * length)
    keys, values = (each.gather(2, order[..., None].expand(*order.shape, each.shape[3])) for each in selection.entries)
    return dataclasses.replace(kept, place=place, entries=(keys, values))


def reader(layer: int, one: LLMPass) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """Gives keys and values [I, H, N, W] of the items' tokens as `layer` holds them now; None without a cache."""
    if one.cache is None:
        return None
    held, now, left = one.cache.layers[layer], one.now, one.left[layer]
    return functools.partial(_entries, held.keys, held.values, now, left)


def _entries(keys: Tensor, values: Tensor, batch: Batch, rows: RowTable) -> tuple[Tensor, Tensor]:
    items = _in_cache(batch, rows, keys.shape[2])
    row = items.row[:, None]
    found = [each.to(row.device).transpose(1, 2)[row, items.index].transpose(1, 2) for each in (keys, values)]
    return found[0], found[1]


def _in_cache(batch: Batch, rows: RowTable, length: int) -> ItemTable:
    """The items with the places of their tokens among `length` physical rows, the last of which `rows` [B, L] are."""
    items, source = batch.items, batch.rows.source
    assert items is not None
    own = rows.source.to(source.device)
    slots = torch.arange(length - own.shape[1], length, device=source.device)
    # Padding slots point at dropped positions, which no token of the items has.
    place = source.new_zeros(batch.size, batch.length).scatter(1, own, slots.expand_as(own))
    index = place[items.row[:, None], items.positions.gather(1, items.token)]
    return dataclasses.replace(items, index=torch.where(items.mask, index, 0))


def evict(cache: CompressedCache, kept: Mapping[int, Kept]) -> None:
    """Drop rows of every layer in the given groups. Synchronises once.

    Raises UnsupportedMethod, before anything changes, where KV heads of a row keep different numbers of entries or are
    not as many as the layer has.
    """
    rows, counts = {}, []
    for group, each in kept.items():
        heads, mask = cache.layers[group].keys.shape[1], cache.masks[group]
        if each.rows.shape[1] not in (1, heads):
            raise UnsupportedMethod(
                f"Selection.keep holds sets for {each.rows.shape[1]} heads, the layers from {group} on have {heads} KV "
                "heads; give a set for each of them, [I, H, N], or one for all, [I, N]"
            )
        rows[group] = keep = each.rows if mask is None else each.rows & mask[:, None]
        numbers = keep.sum(2)
        counts.append(torch.stack([numbers.amin(1), numbers.amax(1)]))
    told: list[list[list[int]]] = torch.stack(counts).tolist() if counts else []
    if any(least != most for least, most in told):
        raise UnsupportedMethod(
            "Selection.keep marks more entries in some KV heads of a layer than in others, and a cache holds as many "
            "for each; mark as many in all heads of an item"
        )
    cache.before = None
    for (group, keep), (least, _) in zip(rows.items(), told, strict=True):
        if (each := kept[group]).entries is not None:
            _write(cache.layers[group], each)
        _take(cache, group, keep, least)


def _write(layer: Any, kept: Kept) -> None:
    """Put the new entries on their places."""
    assert kept.place is not None and kept.entries is not None
    keys, values = kept.entries
    layer.keys, layer.values = _put(layer.keys, kept.place, keys), _put(layer.values, kept.place, values)


def _put(old: Tensor, place: Tensor, new: Tensor) -> Tensor:
    """`old` [B, H, rows, W] with `new` [I, H, K, W] at `place`."""
    flat = torch.cat([old.flatten(0, 2), old.new_zeros(1, old.shape[3])])
    return flat.index_put_((place.to(old.device),), new.to(old))[:-1].view(old.shape)


def _take(cache: CompressedCache, group: int, keep: Tensor, counts: list[int]) -> None:
    """Keep rows of `group`; counts: what `keep` [B, H, rows] has set in each head of each batch row."""
    length = max(counts)
    index = left_pack(keep.flatten(0, 1), length).view(*keep.shape[:2], length, 1)
    end = min((start for start in cache.starts if start > group), default=len(cache.layers))
    for layer in cache.layers[group:end]:
        rows = index.to(layer.keys.device).expand(-1, layer.keys.shape[1], -1, -1)
        layer.keys = layer.keys.gather(2, rows.expand(*rows.shape[:3], layer.keys.shape[3]))
        layer.values = layer.values.gather(2, rows.expand(*rows.shape[:3], layer.values.shape[3]))
    limit = put(counts, keep.device)[:, None]
    uniform = all(count == length for count in counts)
    cache.masks[group] = None if uniform else torch.arange(length, device=keep.device) >= length - limit
