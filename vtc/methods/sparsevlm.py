"""SparseVLM: words that concern the image rate its tokens, some of what leaves is recycled (arXiv:2410.04417)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

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
Count = Literal["budget", "rank"]
CLUSTERS = 0.5
"""Groups for each token that is recycled, with counts by the rank."""
WHOLE = 1e-3
"""What rounding may have taken from a number that is whole."""
SAME = 1e-5
"""Shares that differ by less are equal."""
TABLES = (309, 204, 113), (312, 117, 39), (249, 55, 27), (82, 32, 18)
"""What stages leave of 576 tokens by the released tables, with the tokens that what is recycled becomes."""


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
    place. What stages leave, merged tokens included, lies on a straight line between two released tables, where the
    mean over all layers meets the budget: of 576 tokens 309, 204, 113 (the table "192", a mean of 206.5), 312, 117, 39
    ("128", 145.4), 249, 55, 27 ("96", 114.1) and 82, 32, 18 ("64", 82.3), of other numbers the same shares.

    layers: as above, scaled to the model's depth. ratios: what each stage keeps of the tokens that entered the LLM;
    then no retention or keep is given, and merged tokens come on top, as published: (300, 200, 110) of 576 for the
    label 192, (303, 110, 36) for 128, (66, 30, 17) for 64. schedule: instead of both, such as "sigmoid(8)", "cosine" or
    a rate for every layer. count: "rank" takes no budget but the paper's own count, which depends on prompt and image:
    behind each layer ``d = floor(scale (n - rank P))`` of an item's n tokens leave, P being what each rater pays to
    each of them, mean over heads; int(recycle * d) of these are recycled, into half as many groups, rounded down. The
    rank is the number of singular values above ``max(raters, n) eps`` of the largest, eps being float32's. scale:
    lambda, 0.5 in the public re-implementation. recycle: by default 0.3 as released, and 0.5 with count="rank", as
    there; 0 merges nothing.

    Departures from the paper and its code: exact counts by a budget, which the code has in four tables for LLaVA alone,
    labelled as if layer 2 saw the pruned tokens; what lies between and beyond the tables is ours, and so are x, x^2,
    x^3 of the tokens where other layers are given. With count="rank" raters, layers, clusters and their means are those
    of the code, which has no such count, where the re-implementation has raters of each layer, every fourth layer and
    sums of clusters; the tolerance is ours; without raters the rank is 0; on a GPU torch's decomposition waits for the
    device, beside the wait for the counts. Raters are chosen row by row among the text behind its first visual token
    that is no system prompt, and a token that rates exactly the mean is one. Merged tokens stand on their centres'
    places instead of behind the kept ones. Ties go to the lower index instead of to noise. Batches, several images with
    shares of their own, newline tokens that stay. Without text behind the image the first tokens stay. Whatever acts
    before the LLM does not combine with it, since it reads the embeddings there.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("sparsevlm").plan(llava).stages
    (0, 3, 7, 16)
    >>> vtc.create("sparsevlm", ratios=(0.52, 0.35, 0.19)).needs_budget
    False
    >>> vtc.create("sparsevlm", count="rank").needs_budget
    False
    """

    layers: tuple[int, ...] = (2, 6, 15)
    recycle: float | None = None
    count: Count = "budget"
    scale: float = 0.5

    name: ClassVar[str] = "sparsevlm"
    version: ClassVar[int] = 2
    profiles = tuple(tuple(count / 576 for count in table) for table in TABLES)
    published, published_ratios = (2, 6, 15), (0.52, 0.35, 0.19)
    first, last = 0, DEPTH - 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < 1:
            raise VTCError(f"recycle={self.recycle!r} is no share of what leaves; the code has 0.3, 0 merges nothing")
        if not 0 < self.scale <= 1:
            raise VTCError(f"scale={self.scale!r} is no share of what the rank lacks; pass a number above 0 up to 1")
        if self.count == "rank" and (self.ratios is not None or self.schedule is not None):
            raise VTCError("count='rank' says how many tokens leave; leave out ratios and schedule beside it")

    @property
    def needs_budget(self) -> bool:
        return self.count == "budget" and super().needs_budget

    @property
    def tau(self) -> float:
        """The share of what leaves that is recycled."""
        return (0.5 if self.count == "rank" else 0.3) if self.recycle is None else self.recycle

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
        parts = None if self.count == "rank" else self.parts(view, view.stage)
        if parts is not None and [kept + groups for kept, _, groups in parts] == list(view.items.counts):
            return None
        paid = view.llm_attention(view.stage - 1, TEXT)
        rate = view.memory[self, "raters"].to(paid.device)[view.items.row, : len(paid)]
        score = torch.einsum("tin,it->in", paid, rate / rate.sum(1, keepdim=True).clamp(min=1))
        if parts is not None:
            counts = [stay + merged for stay, _, merged in parts]
            _, number, groups = map(max, zip(*parts, strict=True))
            return recycled(view, score, put(parts, view.device).T, number, groups, counts)
        return recycled(view, score, self.lacking(view, ranks(paid, rate, view.items.mask)), *self.most(view))

    def lacking(self, view: StageView, rank: Tensor) -> Tensor:
        """[3, I] as `parts`, of items whose raters' attention has so many independent rows."""
        have = view.items.mask.sum(1)
        dropped = _whole(self.scale * (have - rank)).minimum(have - 1).clamp(min=0)
        number = _whole(self.tau * dropped)
        groups = _whole(CLUSTERS * number)
        return torch.stack([have - dropped, number * (groups > 0), groups])

    def most(self, view: StageView) -> tuple[int, int]:
        """Tokens that are recycled, and groups, which no item exceeds whatever the rank is."""
        number = int(self.tau * self.scale * max(view.items.counts, default=0) + 2 * WHOLE)
        return number, int(CLUSTERS * number)

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
        if not (dropped and self.tau):
            return 0, 0
        number = int(self.tau * dropped) + 1
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


def _whole(number: Tensor) -> Tensor:
    """What of a number is in front of the point."""
    return (number + WHOLE).floor().long()


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


def ranks(paid: Tensor, rate: Tensor, mask: Tensor) -> Tensor:
    """[I] how many of the rows that rate are linearly independent, up to rounding.

    paid: [T, I, N] what each row of text pays to an item's tokens. rate: [I, T] bool. mask: [I, N] bool.

    >>> paid = torch.tensor([[[0.5, 0.2, 9.0]], [[0.25, 0.1, 9.0]], [[0.0, 0.3, 9.0]]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> some, every, none = [True, True, False], [True] * 3, [False] * 3
    >>> [int(ranks(paid, torch.tensor([rate]), mask)) for rate in (some, every, none)]
    [1, 2, 0]
    """
    there = rate[..., None] & mask[:, None]
    rows = torch.where(there, paid.transpose(0, 1).float().nan_to_num(), 0)
    bound = torch.maximum(rate.sum(1), mask.sum(1)) * torch.finfo(torch.float32).eps
    rank: Tensor = torch.linalg.matrix_rank(rows, rtol=bound)
    return rank


def recycled(
    view: StageView, score: Tensor, parts: Tensor, most: int, groups: int, counts: Sequence[int] | None = None
) -> Selection:
    """Keep the best of each item, and the groups of those that follow.

    parts: [3, I] tokens of each item that stay, that are recycled, and the groups they become. most, groups: no item
    recycles more, or to more groups. counts: what each item keeps, where the host knows.
    """
    items, device = view.items, score.device
    kept, number, clusters = parts
    best = top_k(score, kept, items.mask)
    own = torch.where(best, torch.arange(best.shape[1], device=device), -1)
    if not (most and groups):
        return Selection(best, counts=counts, scores=score)
    again = top_k(score, number, items.mask & ~best, most=most)
    place, there = front_pack(again, most), torch.arange(most, device=device) < number[:, None]
    rows = take_rows(view.tokens, place)
    centre = density_peaks(rows, clusters, there, most=groups)
    weight = 1 / group_sizes(centre, most, there).clamp(min=1).gather(1, centre.clamp(min=0))
    means = merge_rows(rows, torch.where(there, centre, most), weight * there, most)
    lead = there & (centre == torch.arange(most, device=device))
    tokens = view.tokens.scatter(
        1, place[..., None].expand_as(rows), torch.where(lead[..., None], means, rows).to(rows.dtype)
    )
    joins = torch.where(there, place.gather(1, centre.clamp(min=0)), own.gather(1, place))
    keep = best.scatter(1, place, lead | best.gather(1, place))
    return Selection(keep, counts=counts, tokens=tokens, merged_into=own.scatter(1, place, joins), scores=score)
