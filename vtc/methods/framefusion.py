"""FrameFusion: merge what stays the same from frame to frame, layer by layer, then prune by attention (2501.01986)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.ops.frames import latest, likeness, roots
from vtc.ops.host import put
from vtc.ops.nearest import means
from vtc.ops.select import top_k


@register
class FrameFusion(Compressor):
    """Merge tokens with those they resemble at the same place of the frame before, then prune once by attention.

    Acts inside the LLM, from its input on; training-free. Before every layer, a token whose hidden row has a cosine of
    at least `similarity` with the last token left at its place joins it: each run of them becomes its mean, at the
    place of its earliest token. Merging ends behind a layer before which less than `ratio` of the tokens merged; before
    the next layer, once, the tokens to which the last prompt token attends least in that layer, mean over heads, are
    pruned, to as many as meet the budget. If merging alone would fall below what the budget asks of all layers to come,
    only the most similar tokens merge, to exactly as many, and nothing is pruned. Ties go to the lower index.

    similarity, ratio: 0.6 and 0.1 in the code.

    Departures from the paper and its code: the budget, the mean over the layers, is met for each item, up to one token
    per layer; so merging also ends where another layer of as many tokens would leave less than one for each of the
    layers behind, where the code raises, and before the last layer. Frames that lack a token that merged are compared
    with the last token left. A picture is a video of one frame: nothing merges, and it is pruned before layer 1.
    Newline tokens stay and are no candidates. Its costs count the last token's row in every layer but the last, though
    layers behind the pruning are not read.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava-onevision"].references[0]  # 28 layers
    >>> plan = vtc.create("framefusion").plan(llava)
    >>> len(plan.stages), plan.positions
    (28, 'preserve')
    """

    similarity: float = 0.6
    ratio: float = 0.1

    name: ClassVar[str] = "framefusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.similarity <= 1:
            raise VTCError(f"similarity={self.similarity!r} is no cosine; pass a number in [-1, 1], the code has 0.6")
        if not 0 <= self.ratio <= 1:
            raise VTCError(f"ratio={self.ratio!r} is no share of the tokens; the code has 0.1")

    def plan(self, model: ModelSpec) -> Plan:
        layers = model.llm_layers
        return Plan(tuple(range(layers)), Needs(llm=dict.fromkeys(range(layers - 1), Rows.LAST)), "preserve")

    def least_retention(self, model: ModelSpec) -> float:
        """What layer 0 sees where nothing merges."""
        return 1 / model.llm_layers

    def reads(self, model: ModelSpec, layer: int, memory: dict[Any, Any]) -> bool:
        return bool(memory.get((self, "merging"), False))

    def select(self, view: StageView) -> Selection | None:
        items, layers = view.items, view.model.llm_layers
        if view.stage == 0:
            view.keep_from_layer(1)  # refuses a budget that not even one token per later layer meets
        seen: tuple[tuple[Sequence[int], Sequence[int]], ...] = view.memory.get((self, "seen"), ())
        plans = []
        for item, now in enumerate(items.counts):
            before = [counts[item] for counts, _ in seen]
            entered = [*before[1:], now][: len(before)]
            over = any(most[item] == count for (_, most), count in zip(seen, entered, strict=True))
            total = layers * (view.granted[item] - items.fixed[item])
            plans.append((now, False) if over else planned(before, now, total, layers, self.ratio))
        left, merging = [most for most, _ in plans], [merges for _, merges in plans]
        view.memory[self, "seen"] = (*seen, (items.counts, left))
        view.memory[self, "merging"] = any(merging)
        if not any(merging) and left == list(items.counts):
            return None
        keep, merges = put([left, merging], view.device)
        joins, root = self._runs(view, (items.mask.sum(1) - keep) * merges) if any(merging) else (None, None)
        kept = items.mask
        if view.stage != 0:
            pruned = top_k(view.llm_attention(len(seen) - 1, Rows.LAST), keep, items.mask)
            kept = kept & (pruned | (merges > 0)[:, None])
        if joins is None or root is None:
            return Selection(kept, counts=left)
        rows = means(view.tokens, torch.where(items.mask, root, -1))
        return Selection(kept & ~joins, tokens=rows, merged_into=torch.where(kept, root, -1))

    def _runs(self, view: StageView, most: Tensor) -> tuple[Tensor, Tensor]:
        """[I, N] bool which tokens join an earlier one, no more than `most` [I], and the first token of each run."""
        frames = Frames.of(view)
        other = latest(frames.number, frames.place, view.items.mask)
        alike = likeness(view.tokens.detach(), other)
        near = alike >= self.similarity
        joins = top_k(alike, most.minimum(near.sum(1)), near)
        parent = torch.where(joins, other, torch.arange(other.shape[1], device=other.device))
        return joins, roots(parent, frames.most)


def planned(before: Sequence[int], now: int, total: int, layers: int, ratio: float) -> tuple[int, bool]:
    """How many of the `now` tokens in front of a layer may stay, and whether they merge; otherwise they are pruned.

    before: tokens there were in front of each earlier layer. total: tokens that may enter all `layers` together.

    >>> planned([], 100, 200, 4, 0.1), planned([100], 80, 200, 4, 0.1), planned([100], 95, 200, 4, 0.1)
    ((50, True), (40, True), (35, False))
    """
    later = layers - len(before)
    room = total - sum([*before[1:], now]) if before else total
    most = min(now, max(1, math.floor(room / later + 0.5)))
    goes_on = not before or (before[-1] - now >= ratio * before[-1] and room - now >= later - 1 and later > 1)
    return most, goes_on and most < now
