"""SparseVLM: words that concern the image rate its tokens, some of what leaves is recycled (arXiv:2410.04417)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import PRE_LLM, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.method.registry import register
from vtc.method.schedule import DEPTH, scaled
from vtc.method.staged import StagedCompressor
from vtc.ops.attention import attention_rows
from vtc.ops.density import density_peaks
from vtc.ops.host import put
from vtc.ops.merge import merge_rows
from vtc.ops.select import front_pack, group_sizes, take_rows, top_k

BLOCK = 1 << 24
"""Similarities held at a time."""
SAME = 1e-5
"""Shares that differ by less are equal."""


@dataclass(frozen=True)
class TextRows(LLMReading):
    """Softmax attention, mean over heads, of every text token behind the row's first visual one: [T, B, K].

    T is the most text that a row has; what is behind a row's last one reads 0.
    """

    name: ClassVar[str] = "rows of the text"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * text * length * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        asking = rows.asking
        index = front_pack(asking, rows.text_count)
        real = torch.arange(index.shape[1], device=index.device) < asking.sum(1, keepdim=True)
        found = attention_rows(attention.query, attention.key, index, attention.scaling, mask=rows.mask, causal=True)
        return torch.where(real[..., None], found, 0).transpose(0, 1)


TEXT = TextRows()


@register
class SparseVLM(StagedCompressor):
    """Behind three layers of the LLM, keep what the words that concern the image attend to, and recycle the rest.

    Acts inside the LLM, behind layers 2, 6 and 15 of 32; training-free, follows the question. Raters: with visual and
    text embeddings v_i and t_m as they enter the LLM, ``r_m = mean_i softmax_m(v_i t_m)``, and the text tokens with
    r_m of at least the mean rate at all stages. Token j scores what the raters pay to it in the layer in front, mean
    over raters and heads; the best stay. Of the d others the best int(recycle * d) + 1, r of them, are clustered by
    density peaks (`vtc.ops.density`) into int(r / 10) + 1 groups, and each group becomes its mean, on its centre's
    place. Stages leave tokens * x, x^2, x^3, merged ones included, with the one x for which the mean over all layers
    meets the budget.

    layers: as above, scaled to the model's depth. ratios: what each stage keeps of the tokens that entered the LLM;
    then no retention or keep is given, and merged tokens come on top, as published: (300, 200, 110) of 576 for the
    label 192, (303, 110, 36) for 128, (66, 30, 17) for 64. schedule: instead of both, such as "sigmoid(8)", "cosine" or
    a rate for every layer. recycle: 0.3 as released; 0 merges nothing.

    Departures from the paper and its code: exact counts by a budget, which the code has in tables for LLaVA alone and
    the paper replaces by lambda times what the rank of the raters' attention lacks, a count that no budget can meet.
    Raters are chosen row by row among the text behind its first visual token that is no system prompt, and a token that
    rates exactly the mean is one. Merged tokens stand on their centres' places instead of behind the kept ones. Ties go
    to the lower index instead of to noise. Batches, several images with shares of their own, newline tokens that stay.
    Without text behind the image the first tokens stay. Whatever acts before the LLM does not combine with it, since it
    reads the embeddings there.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("sparsevlm").plan(llava).stages
    (0, 3, 7, 16)
    >>> vtc.create("sparsevlm", ratios=(0.52, 0.35, 0.19)).needs_budget
    False
    """

    layers: tuple[int, ...] = (2, 6, 15)
    recycle: float = 0.3

    name: ClassVar[str] = "sparsevlm"
    published, published_ratios = (2, 6, 15), (0.52, 0.35, 0.19)
    first, last = 0, DEPTH - 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recycle < 1:
            raise VTCError(f"recycle={self.recycle!r} is no share of what leaves; the code has 0.3, 0 merges nothing")

    def lists(self, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
        return (tuple(layer + 1 for layer in scaled(self.layers, model.llm_layers, last=model.llm_layers - 2)),)

    def plan(self, model: ModelSpec) -> Plan:
        starts = self.starts(model)
        needs = Needs(llm={start - 1: TEXT for start in starts})
        return Plan((PRE_LLM, *starts), needs, "preserve" if model.mrope else "compact")

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        if view.stage == PRE_LLM:
            view.memory[self, "raters"] = raters(view)
            return None
        assert isinstance(view.stage, int)
        parts = self.parts(view, view.stage)
        if [kept + groups for kept, _, groups in parts] == list(view.items.counts):
            return None
        paid = view.llm_attention(view.stage - 1, TEXT)
        rate = view.memory[self, "raters"].to(paid.device)[view.items.row, : len(paid)].float()
        score = torch.einsum("tin,it->in", paid, rate / rate.sum(1, keepdim=True).clamp(min=1))
        return recycled(view, score, parts)

    def parts(self, view: StageView, start: int) -> list[tuple[int, int, int]]:
        """Of each item: tokens that stay behind the stage `start`, that are recycled, and groups they become."""
        pairs = zip(view.items.counts, self.left(view, start), strict=True)
        if self.needs_budget:
            return [self.split(now, left) for now, left in pairs]
        return [(left, *self.groups(now - left)) for now, left in pairs]

    def groups(self, dropped: int) -> tuple[int, int]:
        """How many of `dropped` tokens are recycled, and the groups they become.

        >>> SparseVLM().groups(276), SparseVLM().groups(1), SparseVLM(recycle=0).groups(9)
        ((83, 9), (1, 1), (0, 0))
        """
        if not (dropped and self.recycle):
            return 0, 0
        number = int(self.recycle * dropped) + 1
        return number, number // 10 + 1

    def split(self, now: int, total: int) -> tuple[int, int, int]:
        """Tokens that stay, that are recycled, and groups, so that `total` of `now` are left.

        Nothing is recycled where the groups alone would exceed that.

        >>> SparseVLM().split(576, 300), SparseVLM().split(576, 1)
        ((291, 86, 9), (1, 0, 0))
        """
        for dropped in range(now - total, now):
            number, groups = self.groups(dropped)
            if now - dropped + groups <= total:
                return now - dropped, number, groups
        return min(now, total), 0, 0


def raters(view: StageView) -> Tensor:
    """[B, T] bool, which of each row's text tokens rate, in the order of `TextRows`."""
    items = view.items
    batch, length = view.text.shape
    asking = view.asking
    most = length - min(items.row_totals(batch))
    place = front_pack(asking, most)
    words = view.states.take(place).float()[items.row].transpose(1, 2)
    said = torch.arange(most, device=place.device) < asking.sum(1, keepdim=True)
    spoken = said[items.row, None]
    total = words.new_zeros(len(items), most)
    size = max(1, BLOCK // max(1, len(items) * most))
    for tokens, real in zip(torch.split(view.tokens, size, 1), torch.split(items.mask, size, 1), strict=True):
        like = torch.bmm(tokens.float(), words).masked_fill(~spoken, torch.finfo(torch.float32).min).softmax(2)
        total = total + torch.where(real[..., None], like, 0).sum(1)
    share = words.new_zeros(batch, most).index_add(0, items.row, total)
    seen = words.new_zeros(batch).index_add(0, items.row, items.mask.sum(1).float())
    return said & (share * said.sum(1, keepdim=True) >= (1 - SAME) * seen[:, None])


def recycled(view: StageView, score: Tensor, parts: Sequence[tuple[int, int, int]]) -> Selection:
    """Keep the best of each item, and the groups of those that follow; parts: as from `SparseVLM.parts`."""
    items, device = view.items, score.device
    kept, number, groups = put(parts, device).T
    best = top_k(score, kept, items.mask)
    own = torch.where(best, torch.arange(best.shape[1], device=device), -1)
    counts = [stay + merged for stay, _, merged in parts]
    most = max(each for _, each, _ in parts)
    if not most:
        return Selection(best, counts=counts, scores=score)
    again = top_k(score, number, items.mask & ~best, most=most)
    place, there = front_pack(again, most), torch.arange(most, device=device) < number[:, None]
    rows = take_rows(view.tokens, place)
    centre = density_peaks(rows, groups, there, most=max(each for *_, each in parts))
    weight = 1 / group_sizes(centre, most, there).clamp(min=1).gather(1, centre.clamp(min=0))
    means = merge_rows(rows, torch.where(there, centre, most), weight * there, most)
    lead = there & (centre == torch.arange(most, device=device))
    tokens = view.tokens.scatter(
        1, place[..., None].expand_as(rows), torch.where(lead[..., None], means, rows).to(rows.dtype)
    )
    joins = torch.where(there, place.gather(1, centre.clamp(min=0)), own.gather(1, place))
    keep = best.scatter(1, place, lead | best.gather(1, place))
    return Selection(keep, counts=counts, tokens=tokens, merged_into=own.scatter(1, place, joins), scores=score)
