"""HoliTom: windows of a video in which places are still, one token for each; fewer of all, inside the LLM too."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import PRE_LLM, Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.frames import Frames
from vtc.method.registry import register
from vtc.method.two_stages import layer_like, left, outer_positions
from vtc.ops.density import density_peaks
from vtc.ops.frames import likeness, windows
from vtc.ops.host import put
from vtc.ops.merge import merge_rows
from vtc.ops.nearest import means, nearest_target
from vtc.ops.rank import rank_in_group
from vtc.ops.select import apportion, top_k

NEIGHBOURS = 7
"""Most tokens that a density looks at."""


@register
class HoliTom(Compressor):
    """Merge what stays the same over a window of frames, keep attended and dense tokens, and merge once in the LLM.

    Training-free; the stage inside the LLM follows the question (arXiv:2505.21334). Before the LLM: a place is the same
    in two neighbouring frames if the cosine of its projected tokens exceeds `threshold`. The video is cut into windows
    of frames: in one of w frames, the places that are the same throughout are still, and each becomes one token, the
    mean over the window, at its place in the first frame. The cut that saves most tokens, w - 1 for each still place,
    is found by dynamic programming. Then the still tokens of each window and the other ones of each frame keep the same
    share of theirs: of a frame those of largest attention, of a window the centres of clusters around density peaks (of
    as many nearest tokens as clusters, at most 7). A centre x whose cluster has the mean m becomes ``own x + (1 - own)
    m``. In front of layer 18 L / 28 of the L layers of the LLM, the share `later` stays: the tokens that the last
    prompt token attends to most in the layer before, mean over heads. Each of the others goes to the kept token h of
    highest cosine, which becomes ``(h + x) / 2``, one x after the other by index. Ties go to the lower index, kept
    tokens stay in raster order.

    threshold: tau, 0.8 in the paper and 0.65 for a retention of 0.1. own: beta, 0.6. later: 0.5; with 1 nothing leaves
    inside the LLM ("w/o M"). The budget is the mean over the layers, where the paper's is what enters the first one.

    Departures from the paper and its code: shares are rounded by the largest remainder and the budget is met exactly;
    where stillness would save more than the budget asks, only the tokens most like those of the frame before merge and
    nothing else leaves. Of equal cuts the one with the shortest last window is taken. A cluster's mean counts its
    centre. Still tokens lie in the first frame, among the others, not in front of it. All tokens of a frame compete by
    attention (D = 0 in the code): the class token's or, without one, what a patch receives, mean over heads and
    queries, in the last layer up to the features that sees the whole image. A picture is a video of one frame, with all
    of its tiles, in which nothing is still. Newline tokens stay and are no candidates.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava-onevision"].references[0]  # 28 layers
    >>> vtc.create("holitom").plan(llava).stages, vtc.create("holitom", later=1.0).plan(llava).stages
    ((0, 18), (0,))
    """

    threshold: float = 0.8
    own: float = 0.6
    later: float = 0.5

    name: ClassVar[str] = "holitom"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise VTCError(f"threshold={self.threshold!r} is no cosine; pass a number in [-1, 1], the paper uses 0.8")
        if not 0 <= self.own <= 1:
            raise VTCError(f"own={self.own!r} is no share of 1; the paper uses 0.6")
        if not 0 < self.later <= 1:
            raise VTCError(f"later={self.later!r} is no share of tokens above 0; the paper uses 0.5, and 1 for none")

    def plan(self, model: ModelSpec) -> Plan:
        seen = {model.key_layer: model.patch_attention}
        plan = super().plan(model)
        if self.later == 1:
            return dataclasses.replace(plan, needs=Needs(seen))
        inner = layer_like(model, 18, 28)
        needs = Needs(seen, {inner - 1: Rows.LAST})
        return dataclasses.replace(plan, stages=(PRE_LLM, inner), needs=needs, positions=outer_positions(model))

    def select(self, view: StageView) -> Selection | None:
        inner = view.model.llm_layers if self.later == 1 else layer_like(view.model, 18, 28)
        counts = left(view, self, inner, self.later)
        if counts == view.items.counts:
            return None
        if view.stage == PRE_LLM:
            return self._outer(view, counts)
        scores = view.llm_attention(inner - 1, Rows.LAST)
        kept = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        into = nearest_target(view.tokens.detach(), kept, view.items.mask, max(counts))
        return Selection(kept, counts=counts, tokens=halved(view.tokens, into), merged_into=into, scores=scores)

    def _outer(self, view: StageView, counts: tuple[int, ...]) -> Selection:
        """The stage before the LLM, with `counts` tokens of each item."""
        frames, mask, keep = Frames.of(view), view.items.mask, put(counts, view.device)
        parts = frames.parts
        still, joins, root = self._still(view, frames, keep)
        merged = means(view.tokens, torch.where(mask, root, -1))
        x = parts.take(merged)
        stays = parts.mask & parts.take(~joins)
        first = stays & parts.take(still)
        sizes = torch.cat([each.sum(1).view_as(frames.sizes) for each in (first, stays & ~first)], 1)
        clusters, best = apportion(keep, sizes).chunk(2, 1)
        score = view.vision_attention(view.model.key_layer).detach()
        attended = top_k(parts.take(score).float(), best.flatten(), stays & ~first)
        most = min(frames.width, max(counts))
        centre = density_peaks(x, clusters.flatten(), first, most=most, near=NEIGHBOURS, capped=True)
        tokens, home = parts.joined(x, centre, attended, self.own)
        kept = home == torch.arange(mask.shape[1], device=view.device)
        into = torch.where(mask, home.gather(1, root), -1)
        return Selection(kept, counts=counts, tokens=tokens, merged_into=into, scores=score)

    def _still(self, view: StageView, frames: Frames, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[I, N] the still tokens, those of them that join the first of their window, and the place each goes to."""
        mask, number = view.items.mask, frames.number
        alike = likeness(view.tokens.detach(), frames.earlier(torch.ones_like(number)))
        spot = number * frames.width + torch.where(mask, frames.place, 0)
        spare = torch.where(mask, spot, frames.most * frames.width)
        same = mask.new_zeros(len(mask), frames.most * frames.width + 1)
        same = same.scatter(1, spare, alike > self.threshold)[:, :-1].view(len(mask), frames.most, -1)
        first, fixed = windows(same)
        still = mask & fixed.flatten(1).gather(1, spot)
        behind = number - first.gather(1, number)
        joins = still & (behind > 0)
        joins = top_k(alike, (mask.sum(1) - keep).minimum(joins.sum(1)), joins)
        here = torch.arange(mask.shape[1], device=mask.device)
        return still & (behind == 0), joins, torch.where(joins, frames.earlier(behind), here)


def halved(x: Tensor, into: Tensor) -> Tensor:
    """Let every kept token become the mean of itself and what joins it, one after the other by index; [I, N, D].

    into: [I, N] the kept token that each one joins, its own place for those kept, -1 for none.

    >>> halved(torch.tensor([[[8.0], [4.0], [2.0]]]), torch.tensor([[0, 0, 0]])).flatten().tolist()
    [4.0, 0.0, 0.0]
    """
    place = torch.arange(into.shape[1], device=into.device).expand_as(into)
    own = into == place
    behind = rank_in_group(into, own, -place)  # those that join later; of a kept token all that join it
    weight = torch.exp2(-(behind + ~own).float())
    return merge_rows(x, torch.where(into < 0, into.shape[1], into), weight, into.shape[1])
