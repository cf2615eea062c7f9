"""LOOK-M: H2O on visual entries, and what leaves is merged into its nearest entry that stays (arXiv:2406.18139)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc.method.base import Selection, StageView
from vtc.method.registry import register
from vtc.methods.h2o import H2O
from vtc.ops.merge import merge_rows
from vtc.ops.nearest import nearest_target
from vtc.ops.select import group_sizes


@register
class LookM(H2O):
    """Keep the visual entries that drew the most attention, and merge the others into those most like them.

    Acts after the prefill; training-free. Entries are ranked as by `h2o`, head by head, 90 % of them for their
    attention and 10 % for being the last. In every KV head of a layer each entry that leaves names the kept entry of
    its image or video whose key has the highest cosine with its own. A kept key k named by the keys d_1 ... d_n becomes
    the mean of itself and of the pivots half-way to them, ``(k + sum_i (d_i + k) / 2) / (n + 1)``; its value the same
    with their values. The prefill is untouched and saves nothing; decoding runs on the shorter cache.

    recent: 0.1 as in the code. per_head: as of `h2o`; the merge is head by head in either case.

    Departures from the paper and its code: those of `h2o`, so that text entries, which the paper prefers, all stay; no
    visual entry merges into text or into another item; of the paper's merges this is the one called pivot. Keys merge
    as they lie in the cache, behind the rotary embedding, as in the code, and sums are in float32.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]
    >>> vtc.create("lookm").recent, vtc.create("lookm").plan(llava).stages[1]
    (0.1, CacheStage(from_layer=1))
    """

    recent: float = 0.1

    name: ClassVar[str] = "lookm"
    version: ClassVar[int] = 1

    def select(self, view: StageView) -> Selection:
        selection = super().select(view)
        keys, values = view.entries
        heads, mask = keys.shape[1], view.items.mask
        kept = (selection.by_head & mask[:, None]).expand(-1, heads, -1).flatten(0, 1)
        left = mask.repeat_interleave(heads, 0)
        assert selection.counts is not None
        into = nearest_target(keys.flatten(0, 1), kept, left, max(selection.counts))
        merged = [pivots(each.flatten(0, 1), into).view_as(each) for each in (keys, values)]
        return dataclasses.replace(selection, entries=(merged[0], merged[1]))


def pivots(x: Tensor, into: Tensor) -> Tensor:
    """Every row as the mean of itself and the points half-way to those that join it; zero where a row joins another.

    x: [G, N, W]. into: [G, N] the row each one joins, its own where it stays, -1 for nowhere.

    >>> pivots(torch.tensor([[[4.0], [8.0], [1.0], [0.0]]]), torch.tensor([[0, 0, 2, 0]])).flatten().tolist()
    [4.0, 0.0, 1.0, 0.0]
    """
    length = into.shape[1]
    target = torch.where(into >= 0, into, length)
    size = group_sizes(into, length + 1, into >= 0).clamp(min=1).gather(1, target)
    own = into == torch.arange(length, device=into.device)
    return merge_rows(x, target, torch.where(own, size + 1, 1) / (2 * size), length)
