"""V2Drop: tokens that a layer of the LLM hardly changes are dropped (arXiv:2509.01552)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.budget import left_by_stages
from vtc.method.registry import register
from vtc.ops.host import put
from vtc.ops.select import take_rows, top_k

DEPTH = 32


@register
class V2Drop(Compressor):
    """Drop, at several depths of the LLM, the visual tokens that the layer before changed least.

    Acts inside the LLM; training-free, follows no question, reads no attention. Before layer l of the list token j has
    the score ``|h_l,j - h_l-1,j|``, the Euclidean length of what layer l - 1 added to it, h_l being the input of layer
    l; the tokens of highest score stay, with their positions (arXiv:2509.01552, section 4). Ties go to the lower index.

    layers: the list, of an LLM of 32 layers, scaled to the depth of others. ratios: the shares of the tokens given to
    the LLM that stages leave, at least one token; then no retention or keep is given. Published: 0.5, 0.25 and one
    token. By default lambda, lambda^2, lambda^3 of the tokens stay, with the lambda that meets the budget as the mean
    over all layers.

    Departures from the paper and its code: the budget is solved for; every image has its own share, where the release
    knows one image a prompt; newline tokens stay.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("v2drop").plan(llava).stages
    (2, 3, 16, 17, 21, 22)
    """

    layers: tuple[int, ...] = (3, 17, 22)
    ratios: tuple[float, ...] | None = None

    name: ClassVar[str] = "v2drop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not self.layers
            or list(self.layers) != sorted(set(self.layers))
            or not 1 <= self.layers[0] <= self.layers[-1] < DEPTH
        ):
            raise VTCError(
                f"layers={self.layers!r} are no ascending layer numbers from 1 to {DEPTH - 1}; "
                "the paper uses (3, 17, 22)"
            )
        if self.ratios is not None and (
            len(self.ratios) != len(self.layers)
            or list(self.ratios) != sorted(self.ratios, reverse=True)
            or not 0 <= self.ratios[-1] <= self.ratios[0] < 1
        ):
            raise VTCError(
                f"ratios={self.ratios!r} must fall and lie between 0 and 1, one for each of {len(self.layers)} layers; "
                "published are (0.5, 0.25, 0.0)"
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
        stages = sorted({stage for layer in self.before(model) for stage in (layer - 1, layer)})
        return Plan(tuple(stages), Needs(), "preserve")

    def least_retention(self, model: ModelSpec) -> float:
        return self.before(model)[0] / model.llm_layers

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        layers, items, tokens = self.before(view.model), view.items, view.tokens
        selection = None
        if view.stage in layers:
            counts = self.left(view, layers.index(view.stage))
            if counts != items.counts:
                change = (tokens.float() - take_rows(view.memory[self], items.token).float()).norm(dim=2)
                marks = top_k(change, put(counts, tokens.device), items.gaps, most=max(counts))
                selection = Selection(marks, counts=counts, scores=change)
        if view.stage + 1 in layers:
            view.memory[self] = _by_token(view)
        return selection

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


def _by_token(view: StageView) -> Tensor:
    """[I, n, D] rows of the tokens by their numbers in their items, whatever leaves in between."""
    items, tokens = view.items, view.tokens
    width = max(layout.n_tokens for layout in items.layouts)
    slot = torch.where(items.mask, items.token, width)
    table = tokens.new_zeros(len(items), width + 1, tokens.shape[2])
    return table.scatter(1, slot[..., None].expand_as(tokens), tokens)
