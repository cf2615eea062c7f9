"""CDPruner: diverse tokens that have to do with the question, by a determinantal point process (arXiv:2506.10967)."""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtc.errors import VTCError
from vtc.method.base import ModelSpec, Plan, Scope, Selection, StageView
from vtc.method.groups import Groups
from vtc.method.pairs import PairedCompressor
from vtc.method.registry import register
from vtc.ops.greedy import greedy_map
from vtc.ops.select import settle
from vtc.ops.similarity import alignment, total

Relevance = Literal["llm", "clip"]


@register
class CDPruner(PairedCompressor):
    """Keep the tokens that span the largest volume, each counted by its relevance to the question.

    Acts before the LLM, reads the question; training-free. Relevance ``r_j = -mean_m cos(e_j, t_m)`` of token j to the
    texts t_m is scaled to ``q_j = (r_j - min r + 1e-6) / (max r - min r)`` over the item. Of the kernel ``L_ij = q_i
    cos(v_i, v_j) q_j`` of the projected tokens v, the greedy mode is kept: the token that raises the determinant of L
    over the chosen ones most, one at a time. Ties go to the lower index, kept tokens stay in raster order.

    relevance: "clip" is the paper's own, on models with a CLIP tower: e_j is the row that the tower hands to the
    projector, through the last norm and the visual projection of the CLIP from which it was taken, and t that CLIP's
    text embedding of the question. `pair` names this CLIP, which is loaded beside the model; its parameters and
    operations count as the method's. "llm", the default, needs nothing else and runs on every model: e_j = v_j, and t
    is the mean of the LLM's embeddings of the question (the prompt's text without its system prompt). THAT IS ADAPTED;
    say so with its results. Without a question all tokens are equally relevant. inverse: the minus sign above, as in
    the released code; False prefers tokens that resemble the question. theta: None, or the weight of relevance against
    diversity in [0, 1), ``q <- exp(theta q / (2 - 2 theta))``. scope: "crop" chooses in every crop or frame the same
    share of its tokens, "item" among all tokens together.

    Departures from the paper and its code: relevance="llm" by default. With "clip", questions longer than the text
    tower takes are cut off instead of averaged over segments, and tokens that are means of patches (frames of
    LLaVA-NeXT-Video) are projected as such. Relevance is scaled over each item instead of over all crops of a call, so
    that a batch equals its rows. Beyond the rank of L (the width of the tokens), where the code divides by zero, the
    most relevant of the remaining tokens fill the budget. AnyRes images keep their resolution and their newline tokens,
    which are no candidates; crops get the same share of their tokens, not the same count; multi-axis rotary models keep
    original positions.

    >>> import vtc
    >>> vtc.create("cdpruner", theta=0.5)
    CDPruner(pair=None, relevance='llm', inverse=True, theta=0.5, scope='crop')
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 layers, those up to 22 run
    >>> vtc.create("cdpruner", relevance="clip", pair="ViT-L-14-336:openai").plan(llava).needs.pairs
    ('ViT-L-14-336:openai',)
    """

    relevance: Relevance = "llm"
    inverse: bool = True
    theta: float | None = None
    scope: Scope = field(default="crop", kw_only=True)

    name: ClassVar[str] = "cdpruner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise VTCError(
                f"theta={self.theta!r} is outside [0, 1); write for example 0.5 for equal weights, or None for "
                "relevance as it is"
            )
        if self.pair is not None and self.relevance != "clip":
            raise VTCError(
                f"pair={self.pair!r} is given, which relevance={self.relevance!r} does not use; write relevance='clip'"
            )

    def plan(self, model: ModelSpec) -> Plan:
        plan = super().plan(model)
        return self.paired(plan, model) if self.relevance == "clip" else plan

    def select(self, view: StageView) -> Selection:
        groups = Groups.of(view, self.scope)
        quality = groups.parts.take(self.quality(view))
        order = greedy_map(groups.parts.take(view.tokens), quality, groups.steps, groups.parts.mask)
        return Selection(groups.chosen(order), counts=view.keep)

    def quality(self, view: StageView) -> Tensor:
        """[I, N] how much each token counts."""
        if self.relevance == "clip":
            tokens, question = self.compared(view)
        else:
            tokens, question = view.tokens, total(view.hidden, view.text)[view.items.row]  # the direction of the mean
        return relevance(tokens, question[:, None], view.items.mask, inverse=self.inverse, theta=self.theta)


def relevance(
    tokens: Tensor, texts: Tensor, mask: Tensor, *, inverse: bool = True, theta: float | None = None
) -> Tensor:
    """[I, N] how much tokens [I, N, D] have to do with texts [I, M, D], above 0 and up to about 1; float32.

    Minus the mean cosine to the texts (plus it unless `inverse`), scaled to the range over the unmasked. Constant
    values become 1. theta: as in `CDPruner`.
    """
    towards = torch.nn.functional.normalize(texts.detach().float(), dim=2).mean(1)
    like = settle(alignment(tokens, -towards if inverse else towards), mask)
    lowest = like.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    span = like.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - lowest
    quality = torch.where(span > 0, (like - lowest + 1e-6) / span, 1.0)
    return quality if theta is None else (theta / (2 * (1 - theta)) * quality).exp()
