"""TransPrune: tokens that the layers change and the question asks for stay, at three depths (arXiv:2507.20630)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.budget import left_by_stages
from vtc.method.plan import grouped
from vtc.method.registry import register
from vtc.ops.host import put
from vtc.ops.select import top_k

DEPTH = 32
"""The layers' numbers are those of an LLM of so many layers."""


@register
class TransPrune(Compressor):
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
    Published: 0.875, 0.625, 0.125, which is a mean of 41 %. By default lambda, lambda^2, lambda^3 of the tokens stay,
    with the lambda that meets the budget as the mean over all layers. question: False ranks by t alone and reads no
    attention.

    Departures from the paper and its code: the budget is solved for; the text is that behind a prompt's first image,
    and where none stands there t alone ranks; every image has its own share and its own sums, where the release knows
    one image and one prompt; newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("transprune").plan(llava).stages
    (7, 9, 12)
    >>> vtc.create("transprune", ratios=(0.875, 0.625, 0.125)).needs_budget
    False
    """

    layers: tuple[int, ...] = (7, 9, 12)
    ratios: tuple[float, ...] | None = None
    question: bool = True

    name: ClassVar[str] = "transprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = bool(self.layers) and all(first < second for first, second in pairwise(self.layers))
        if not rising or not 1 <= self.layers[0] <= self.layers[-1] < DEPTH:
            raise VTCError(
                f"layers={self.layers!r} are no ascending layer numbers from 1 to {DEPTH - 1}; "
                "the paper uses (7, 9, 12)"
            )
        if self.ratios is not None and (
            len(self.ratios) != len(self.layers)
            or list(self.ratios) != sorted(self.ratios, reverse=True)
            or not 0 < self.ratios[-1] <= self.ratios[0] < 1
        ):
            raise VTCError(
                f"ratios={self.ratios!r} must fall and lie between 0 and 1, one for each of {len(self.layers)} layers; "
                "published are (0.875, 0.625, 0.125)"
            )

    @property
    def needs_budget(self) -> bool:
        return self.ratios is None

    def before(self, model: ModelSpec) -> tuple[int, ...]:
        """The LLM layers before which tokens leave."""
        scaled = (max(1, math.floor(layer * model.llm_layers / DEPTH + 0.5)) for layer in self.layers)
        found = tuple(dict.fromkeys(layer for layer in scaled if layer < model.llm_layers))
        if not found or (self.ratios is not None and len(found) != len(self.layers)):
            raise UnsupportedMethod(
                f"layers={self.layers!r} of {DEPTH} are {len(found)} of this {model.family} model's {model.llm_layers} "
                "LLM layers; pass layers that are further apart or earlier"
            )
        return found

    def plan(self, model: ModelSpec) -> Plan:
        stages = self.before(model)
        moves = [(layer, Rows.TRANSITION) for layer in range(stages[0] - 1, stages[-1])]
        asks = [(stage, Rows.QUESTION_AHEAD) for stage in stages] if self.question else []
        return Plan(stages, Needs(llm=grouped([*moves, *asks])), "preserve" if model.mrope else "compact")

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        layers = self.before(view.model)
        counts = self.left(view, layers.index(view.stage))
        if counts == view.items.counts:
            return None
        moved = [view.llm_attention(layer, Rows.TRANSITION).sum(0) for layer in range(layers[0] - 1, view.stage)]
        scores = shares(torch.stack(moved).sum(0), view.items.mask)
        if self.question:
            scores = scores + shares(view.llm_attention(view.stage, Rows.QUESTION_AHEAD), view.items.mask)
        marks = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        return Selection(marks, counts=counts, scores=scores)

    def left(self, view: StageView, stage: int) -> tuple[int, ...]:
        """Tokens that each item has behind a stage."""
        items, layers = view.items, self.before(view.model)
        if self.ratios is not None:
            wanted = [max(1, int(entered * self.ratios[stage])) for entered in items.entered]
        else:
            spans = tuple(after - before for before, after in pairwise((0, *layers, view.model.llm_layers)))
            columns = zip(items.counts, items.entered, view.granted, items.fixed, items.input_counts, strict=True)
            wanted = [
                now if granted >= entered + fixed else left_by_stages(entered, 1, granted, fixed, given, spans)[stage]
                for now, entered, granted, fixed, given in columns
            ]
        return tuple(min(now, count) for now, count in zip(items.counts, wanted, strict=True))


def shares(values: Tensor, mask: Tensor) -> Tensor:
    """[I, N] values as shares of their sums over what `mask` marks.

    >>> shares(torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [[0.75, 0.25, 2.25]]
    """
    return values / (torch.where(mask, values, 0).sum(1, keepdim=True) + 1e-8)
