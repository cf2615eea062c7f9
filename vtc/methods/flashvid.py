"""FlashVID: attended tokens that differ, trees of similar tokens over frames as one each; fewer inside the LLM."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import PRE_LLM, Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.groups import largest_share
from vtc.method.registry import register
from vtc.method.two_stages import layer_like, left, outer_positions
from vtc.ops.density import density_peaks
from vtc.ops.frames import likeness, quotas, roots, segments
from vtc.ops.greedy import chosen, k_center
from vtc.ops.host import put
from vtc.ops.nearest import means, nearest
from vtc.ops.rank import rank_in_group
from vtc.ops.select import apportion, group_sizes, settle, top_k

NEIGHBOURS = 7
"""Tokens that a density looks at."""


@register
class FlashVID(Compressor):
    """Keep attended, diverse tokens of every frame, merge the others along the frames, and prune once inside the LLM.

    Training-free; the stage inside the LLM follows the question (arXiv:2602.08024). A segment ends behind frame f where
    the cosine of the mean projected tokens of f and f + 1 is below `threshold`, and at the `segments` - 1 smallest.
    Of its share b of the budget a frame keeps ceil(diverse b) tokens as they are: greedily always the token j with the
    largest ``w_j min_i (1 - cos(x_i, x_j))`` over the chosen i, the first one over all others, where w_j is the
    attention a_j times ``x_j . s``, s being the mean token of the segment. Every other token whose cosine with the most
    similar of the other tokens in the frame before, in its segment, is above `similarity` hangs on that one, and each
    tree becomes the mean of its tokens, at its root in the earliest frame. What the frames of a segment have left of
    their shares goes to them by their numbers of roots: these are clustered around density peaks (of 7 nearest tokens),
    and the mean of a cluster's roots stays at its centre. In front of layer 20 L / 28 of the L layers of the LLM the
    share `later` stays: the tokens that the last prompt token attends to most in the layer before, mean over heads.
    Ties go to the lower index, kept tokens stay in raster order.

    segments, threshold: 8 and 0.9 in the code. diverse: 0.7. similarity: 0.8; where fewer roots than the budget would
    be left, only the most similar links of the segment are made. later: 0.3, so that 1.25 times the retention, the mean
    over the layers, enters the LLM; with 1 nothing leaves inside it.

    Departures from the paper and its code: frames' shares are rounded by the largest remainder and the budget is met
    exactly; a frame's roots keep at least one token where the segment can pay one for each frame that has some.
    Products x_j . s below 0 count as 0. Attention is the class token's or, without one, what a patch receives, mean
    over heads and queries, in the last layer up to the features that sees the whole image. The mean of a cluster counts
    every root once. Nothing is random. A picture is a video of one frame, with all of its tiles. Newline tokens stay
    and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava-onevision"].references[0]  # 28 layers
    >>> vtc.create("flashvid").plan(llava).stages
    (0, 20)
    """

    segments: int = 8
    threshold: float = 0.9
    diverse: float = 0.7
    similarity: float = 0.8
    later: float = 0.3

    name: ClassVar[str] = "flashvid"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments < 1:
            raise VTCError(f"segments={self.segments!r} has to be at least 1; the code has 8")
        if not 0 <= self.diverse <= 1:
            raise VTCError(f"diverse={self.diverse!r} is no share of 1; the code has 0.7")
        if not -1 <= self.similarity <= 1:
            raise VTCError(f"similarity={self.similarity!r} is no cosine; pass a number in [-1, 1], the code has 0.8")
        if not 0 < self.later <= 1:
            raise VTCError(f"later={self.later!r} is no share of tokens above 0; the code has 0.3, and 1 is for none")

    def plan(self, model: ModelSpec) -> Plan:
        seen = {model.key_layer: model.patch_attention}
        plan = super().plan(model)
        if self.later == 1:
            return dataclasses.replace(plan, needs=Needs(seen))
        inner = layer_like(model, 20, 28)
        needs = Needs(seen, {inner - 1: Rows.LAST})
        return dataclasses.replace(plan, stages=(PRE_LLM, inner), needs=needs, positions=outer_positions(model))

    def select(self, view: StageView) -> Selection | None:
        inner = view.model.llm_layers if self.later == 1 else layer_like(view.model, 20, 28)
        counts = left(view, self, inner, self.later)
        if counts == view.items.counts:
            return None
        if view.stage == PRE_LLM:
            return self._merged(view, counts)
        scores = view.llm_attention(inner - 1, Rows.LAST)
        kept = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        return Selection(kept, counts=counts, scores=scores)

    def _merged(self, view: StageView, counts: tuple[int, ...]) -> Selection:
        """The stage before the LLM, with `counts` tokens of each item."""
        frames, mask = Frames.of(view), view.items.mask
        parts, sizes = frames.parts, frames.sizes
        x = parts.take(view.tokens.detach())
        middle = frames.mean(x).view(*sizes.shape, -1)
        segment, _ = segments(middle, sizes > 0, self.segments, self.threshold)
        share = apportion(put(counts, view.device), sizes)
        first = (share.double() * self.diverse - 1e-9).ceil().long()
        score = view.vision_attention(view.model.key_layer).detach()
        worth = parts.take(score).float() * relevance(x, middle, segment, sizes > 0)
        steps = max(math.ceil(self.diverse * most) for most in self._shares(view, counts))
        diverse = chosen(k_center(x, None, steps, parts.mask, worth=worth), first.flatten(), parts.mask)
        free = parts.mask & ~diverse
        spends = group_totals(share - first, segment)
        root = self._trees(view, frames, free, segment, spends)
        number = torch.arange(mask.shape[1], device=mask.device)
        merged = means(view.tokens, torch.where(mask, root, -1))
        ends = free & parts.take(root == number)
        member = segment[:, None] == number[: frames.most, None]
        size = (member * ends.sum(1).view_as(sizes)[:, None]).flatten(0, 1)
        quota = quotas(size.double(), spends.flatten(), size, least=1).view_as(member).sum(1)
        rows, most = parts.take(merged), min(frames.width, max(counts))
        centre = density_peaks(rows, quota.flatten(), ends, most=most, near=NEIGHBOURS)
        tokens, home = parts.joined(rows, centre, diverse)
        into = torch.where(mask, home.gather(1, root), -1)
        return Selection(home == number, counts=counts, tokens=tokens, merged_into=into, scores=score)

    @staticmethod
    def _shares(view: StageView, counts: tuple[int, ...]) -> list[int]:
        """No frame of an item keeps more."""
        columns = zip(counts, view.items.counts, view.items.layouts, strict=True)
        return [largest_share(k, n, each.crop_sizes) if each.kind == "video" else k for k, n, each in columns]

    def _trees(self, view: StageView, frames: Frames, free: Tensor, segment: Tensor, spends: Tensor) -> Tensor:
        """[I, N] the root of each token, itself where it hangs on none.

        free: [R, W] tokens that may hang on others. spends: [I, G] roots that each segment has to have at least.
        """
        parts, mask = frames.parts, view.items.mask
        same = torch.nn.functional.pad(segment[:, 1:] == segment[:, :-1], (1, 0)).flatten()
        there = free[:-1] & same[1:, None]
        x, pad = parts.take(view.tokens.detach()), torch.nn.functional.pad
        found = pad(parts.numbers[:-1].gather(1, nearest(x[1:], x[:-1], there)), (0, 0, 1, 0))
        hangs = mask & parts.give(free & pad(there.any(1), (1, 0))[:, None])
        other = torch.where(hangs, parts.give(found), -1)
        alike = likeness(view.tokens.detach(), other)
        near, own = alike > self.similarity, segment.gather(1, frames.number)
        most = group_sizes(own, frames.most, mask & parts.give(free)) - spends
        rank = rank_in_group(torch.where(near, own, frames.most), best=settle(alike, near))
        links = near & (rank < most.gather(1, own))
        return roots(torch.where(links, other, torch.arange(mask.shape[1], device=mask.device)), frames.most)


def relevance(x: Tensor, middle: Tensor, segment: Tensor, real: Tensor) -> Tensor:
    """[R, W] product of every token with the mean of its segment's frames, at least 0.

    x: [R, W, D] tokens of the I * G frames. middle: [I, G, D] mean of each. segment: [I, G] of each frame. real: [I, G]
    bool, the frames there are.

    >>> x = torch.tensor([[[2.0, 0.0]], [[4.0, 2.0]]])
    >>> relevance(x, x.view(1, 2, 2), torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool)).tolist()
    [[6.0], [14.0]]
    """
    member = ((segment[:, :, None] == segment[:, None]) & real[:, None]).float()
    mean = torch.bmm(member, middle) / member.sum(2, keepdim=True).clamp(min=1)
    return torch.bmm(x.float(), mean.flatten(0, 1)[..., None])[..., 0].clamp(min=0)


def group_totals(values: Tensor, group: Tensor) -> Tensor:
    """[I, G] sum of the values of each group; values, group: [I, G].

    >>> group_totals(torch.tensor([[1, 2, 4]]), torch.tensor([[0, 1, 1]])).tolist()
    [[1, 6, 0]]
    """
    return torch.zeros_like(values).scatter_add(1, group, values)
