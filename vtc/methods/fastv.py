"""FastV: after the first layers of the LLM, the tokens that the last prompt token attends to (arXiv:2403.06764)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.registry import register
from vtc.method.staged import ScheduledCompressor
from vtc.ops.host import put
from vtc.ops.select import top_k

Ranked = Literal["item", "row"]


@register
class FastV(ScheduledCompressor):
    """Let the first K layers of the LLM see every visual token, the others those with the most attention.

    Acts inside the LLM; training-free, follows the question. Before layer K a token's score is what the last prompt
    token pays to it in layer K - 1, mean over heads (section 4.1); the best stay, in their order and at their
    positions, and the KV cache of layers from K on holds only them.

    layer: K, 2 as in the paper. ratio: R, the fraction that is removed; then no retention or keep is given and
    round(N * (1 - R)) of N tokens stay (half rounds to even, at least one), as published (R = 0.5). By default the
    budget is the mean over all layers, as for every method here: retention 1/3 of 576 tokens leaves 166 of them from
    layer 2 of 32 on. schedule: instead of both, tokens leave before several layers, each time by the layer in front;
    such as "sigmoid(8)", "cosine" or a rate for every layer, which takes no budget. scope: "item" ranks every image or
    video by itself, "row" all of a prompt together, as released, without a schedule; an image may then lose all its
    tokens to another.

    Departures from the paper and its code: images of a prompt keep their own share by default; newline tokens stay (the
    release ranks the span of an image with its newlines); prompts are pruned once, at the prefill, as in the released
    variant with a KV cache, and not again at every step; each row of a batch is read at its own last token.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("fastv", layer=3).plan(llava).needs.llm
    {2: LastRow()}
    >>> vtc.create("fastv", ratio=0.5).needs_budget
    False
    """

    layer: int = 2
    ratio: float | None = None
    scope: Ranked = "item"

    name = "fastv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise VTCError(
                f"layer={self.layer!r} leaves no layer in front to rank by; pass at least 1, the paper uses 2 and 3"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise VTCError(f"ratio={self.ratio!r} is no fraction to remove; pass a number between 0 and 1, as 0.5")
        self.alone("layer", "ratio", "scope")

    @property
    def needs_budget(self) -> bool:
        return self.ratio is None and super().needs_budget

    def plan(self, model: ModelSpec) -> Plan:
        stages = self.starts(model) or (self.layer,)
        return Plan(stages, Needs(llm={stage - 1: Rows.LAST for stage in stages}), "preserve")

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        items, device = view.items, view.device
        if self.schedule is not None:
            counts = self.left(view, view.stage)
            if counts == items.counts:
                return None
        else:
            counts = view.keep_from_layer(self.layer) if self.ratio is None else self._left(items.counts)
        if self.scope == "item":
            scores, keep = view.llm_attention(view.stage - 1, Rows.LAST), put(counts, device)
            kept = top_k(scores, keep, items.gaps, most=max(counts, default=0))
            return Selection(kept, counts=counts, scores=scores)
        rows = view.hidden.shape[0]
        totals = _by_row(items.rows, counts, rows)
        if self.ratio is not None:
            totals = self._left(_by_row(items.rows, items.counts, rows))
        ranked = items.scatter(items.mask, torch.zeros_like(view.visual))
        ranking: Tensor = view.llm_rows[self.layer - 1, Rows.LAST]
        chosen = top_k(ranking, put(totals, device), ranked, most=max(totals))
        return Selection(chosen[items.row[:, None], items.index])

    def _left(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """What `ratio` leaves of so many tokens."""
        assert self.ratio is not None
        return tuple(min(count, max(1, round(count * (1 - self.ratio)))) for count in tokens)


def _by_row(rows: tuple[int, ...], counts: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """Counts of a batch's rows from those of its items."""
    totals = [0] * batch
    for row, count in zip(rows, counts, strict=True):
        totals[row] += count
    return tuple(totals)
