"""TransPrune: tokens that the layers change and the question asks for stay, at three depths (arXiv:2507.20630)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vtc.method.base import ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.plan import grouped
from vtc.method.registry import register
from vtc.method.schedule import DEPTH, scaled
from vtc.method.staged import StagedCompressor
from vtc.ops.host import put
from vtc.ops.select import top_k


@register
class TransPrune(StagedCompressor):
    """Drop, at several depths of the LLM, the visual tokens that its blocks turn and stretch least.

    Acts inside the LLM; training-free, follows the question. A block, attention or MLP, makes b_j of the normed a_j;
    its transition is ``w_j = (|b_j| / |a_j|) softmax_j(1 - cos(a_j, b_j))``, over all tokens of the prompt. Before each
    layer of the list a token has the score ``t_j / sum t + g_j / sum g``: t adds w up over both blocks of all layers
    from the one in front of the first stage on, g is what the text behind the image pays to the token by the
    projections of the layer that follows, mean over its rows and over heads, and the sums run over the tokens still
    there. The best stay, and the whole prompt is numbered anew without gaps, except under multi-axis positions. Ties go
    to the lower index.

    layers: the list, of an LLM of 32 layers, scaled to the depth of others. ratios: what each stage leaves of the
    tokens given to the LLM; then no retention or keep is given and int(N * ratio) of N tokens stay, at least one.
    Published: 0.875, 0.625, 0.125, which is a mean of 41 %. By default the last stage leaves r of the tokens, the
    others ``1 - (1 - r) / 7`` and ``1 - 3 (1 - r) / 7``, with the r that meets the budget as the mean over all layers,
    which at 41 % are the published shares; below 33 % the last stage leaves one token, and both others fall by a common
    factor. With other layers lambda, lambda^2, ... of the tokens stay. schedule: instead of both, such as "sigmoid(8)",
    "cosine" or a rate for every layer. question: False ranks by t alone and reads no attention.

    Departures from the paper and its code: the budget is solved for, by shares that are ours at other means than the
    published; the text is that behind a prompt's first image, and where none stands there t alone ranks; every image
    has its own share and its own sums, where the release knows one image and one prompt; newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("transprune").plan(llava).stages
    (7, 9, 12)
    >>> vtc.create("transprune", ratios=(0.875, 0.625, 0.125)).needs_budget
    False
    """

    layers: tuple[int, ...] = (7, 9, 12)
    question: bool = True

    name: ClassVar[str] = "transprune"
    version: ClassVar[int] = 2
    published, published_ratios = (7, 9, 12), (0.875, 0.625, 0.125)
    profiles = ((6 / 7, 4 / 7, 0.0),)
    last, rounds = DEPTH - 1, 0.0

    def lists(self, model: ModelSpec) -> tuple[tuple[int, ...], ...]:
        return (scaled(self.layers, model.llm_layers, first=1),)

    def plan(self, model: ModelSpec) -> Plan:
        starts = self.starts(model)
        moves = [(layer, Rows.TRANSITION) for layer in range(starts[0] - 1, starts[-1])]
        asks = [(start, Rows.QUESTION_AHEAD) for start in starts] if self.question else []
        return Plan(starts, Needs(llm=grouped([*moves, *asks])), "preserve" if model.mrope else "compact")

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        counts = self.left(view, view.stage)
        if counts == view.items.counts:
            return None
        first = self.starts(view.model)[0]
        moved = [view.llm_attention(layer, Rows.TRANSITION).sum(0) for layer in range(first - 1, view.stage)]
        scores = shares(torch.stack(moved).sum(0), view.items.mask)
        if self.question:
            scores = scores + shares(view.llm_attention(view.stage, Rows.QUESTION_AHEAD), view.items.mask)
        marks = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        return Selection(marks, counts=counts, scores=scores)


def shares(values: Tensor, mask: Tensor) -> Tensor:
    """[I, N] values as shares of their sums over what `mask` marks.

    >>> shares(torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [[0.75, 0.25, 2.25]]
    """
    return values / (torch.where(mask, values, 0).sum(1, keepdim=True) + 1e-8)
