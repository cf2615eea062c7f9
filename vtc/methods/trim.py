"""TRIM: patches that a CLIP finds related to the question, and the mean of all others (arXiv:2409.10994)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from vtc.method.base import ModelSpec, Plan, Selection, StageView
from vtc.method.groups import Groups, Parts
from vtc.method.pairs import PairedCompressor
from vtc.method.parts import seated
from vtc.method.registry import register
from vtc.ops.rank import order_by
from vtc.ops.select import outliers, take_rows, top_k

Count = Literal["budget", "outliers"]


@register
class TRIM(PairedCompressor):
    """Keep the patches whose product with the question's CLIP embedding is smallest, and the mean of all others.

    Acts before the LLM, on models with a CLIP tower; reads the question; training-free, but needs the CLIP from which
    the tower was taken: `pair` names it, it is loaded beside the model, and its parameters and operations count as the
    method's. p_j is the row of token j that the tower hands to the projector, through the CLIP's last norm and visual
    projection, t the CLIP's text embedding of the question, and ``s = softmax_j(-p_j . t)``. The minus sign is the
    released code's: patches of the background resemble texts. Of k tokens, the k - 1 with the largest s are kept, in
    raster order, and one more behind them is the mean of all that were not. Crops, tiles and frames are treated one by
    one and share k in proportion to their sizes; one that keeps all its tokens stays as it is. Ties go to the lower
    index.

    count: "outliers" takes no budget but the paper's own count, which depends on image and question: the tokens with
    ``s > Q3 + 1.5 (Q3 - Q1)``, at least one, and the mean.

    Departures from the paper and its code: features behind the projector instead of in front of it, so that the mean is
    one of projected tokens; the mean counts among the k tokens of a budget; newline tokens of tiled images stay;
    questions longer than the text tower takes are cut off; tokens that are means of patches (frames of
    LLaVA-NeXT-Video) are projected as such; the trained variant is left out.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 layers, those up to 22 run
    >>> vtc.create("trim", pair="ViT-L-14-336:openai").plan(llava).needs.vision
    {22: (LayerOutput(),)}
    >>> vtc.create("trim", pair="tiny-clip", count="outliers").needs_budget
    False
    """

    count: Count = "budget"

    name: ClassVar[str] = "trim"

    @property
    def needs_budget(self) -> bool:
        return self.count == "budget"

    def plan(self, model: ModelSpec) -> Plan:
        return self.paired(super().plan(model), model)

    def select(self, view: StageView) -> Selection:
        tokens, question = self.compared(view)
        score = -(tokens @ question[..., None])[..., 0]
        parts = Parts.of(view, "crop")
        mask, size, ranked = parts.mask, parts.mask.sum(1), parts.take(score)
        if self.needs_budget:
            keep = Groups.of(view, "crop").keep
            best = top_k(ranked, torch.where(keep < size, keep - 1, size).clamp(min=0), mask)
        else:
            keep = size
            best = outliers(ranked.masked_fill(~mask, -torch.inf).softmax(1), mask)
        dropped = mask & ~best & (keep > 0)[:, None]
        place = torch.arange(mask.shape[1], device=mask.device)
        last = (dropped * place).amax(1, keepdim=True)  # where the mean lies until the order is made
        extra = dropped & (place == last)
        share = dropped / dropped.sum(1, keepdim=True).clamp(min=1)
        mean = torch.bmm(share[:, None], parts.take(view.tokens).float()).to(view.tokens.dtype)
        number = torch.arange(score.shape[1], device=mask.device).expand_as(score).contiguous()
        number = parts.take(number)
        into = torch.where(dropped, number.gather(1, last), torch.where(best, number, -1))
        stays, into = parts.give(best | extra), torch.where(parts.give(mask), parts.give(into), -1)
        extra = parts.give(extra)
        order = order_by(torch.where(stays, 2 * view.crop + extra, 2 * view.most_crops))  # each mean behind its crop
        counts = view.keep if self.needs_budget else None
        first = order[:, : max(counts, default=0)] if counts else order
        means = take_rows(mean.view(len(stays), -1, mean.shape[2]), view.crop.gather(1, first).clamp(min=0))
        rows = torch.where(extra.gather(1, first)[..., None], means, take_rows(view.tokens, first))
        rows, into = seated(stays, rows, into, order)
        return Selection(stays, counts=counts, tokens=rows, merged_into=into, scores=score)
