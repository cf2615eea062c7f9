"""Token Transforming: fewer tokens as the product with a matrix that mixes many into many (arXiv:2506.05709)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Plan, Selection, StageView
from vtc.method.parts import even, inside_plan, merged_inside
from vtc.method.registry import register
from vtc.ops.select import first_best, front_pack, take_rows, top_k

Mode = Literal["m2m", "m2o", "o2o"]
ALIKE = 1e-5
"""Cosines closer than this count as equal."""


@register
class TokenTransforming(Compressor):
    """Replace the patches X by W X with fewer rows, every new token a mixture of all old ones.

    Training-free, text-agnostic; inside the encoder alone, for encoders that allow it. Anchors are the patches to which
    the class token pays most attention in the block before (without a class token: those that receive most); a new
    token stands at its anchor. Many to many: ``W[i, j] = softmax_j(cos(x_i, x_j) / tau)`` for anchor i over all patches
    j. Many to one is merging: every patch joins the anchor it resembles most, and anchors become means. One to one is
    pruning: W has a single one in every row.

    mode: "m2m", "m2o" or "o2o". tau: temperature of the mixture; the smaller, the closer to pruning. layers: stages,
    each in front of the block of that number; by default a quarter, half and three quarters of the way up, and the
    share of its patches that a stage leaves is the same for all.

    Departures from the paper and its code: a re-implementation from the idea alone, since no code was released: that W
    is a softmax of cosines, its temperature, the anchors and the layers are ours. The class token and registers stay as
    they are. Retention is met exactly and counts per crop.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 encoder layers
    >>> [stage.layer for stage in vtc.create("token_transforming").plan(llava).stages]
    [5, 11, 17]
    """

    mode: Mode = "m2m"
    tau: float = 0.1
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "token_transforming"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise VTCError(f"tau={self.tau} is no temperature; write for example tau=0.1, or mode='o2o' to prune")
        if self.layers is not None and (not self.layers or list(self.layers) != sorted({*self.layers})):
            raise VTCError(f"layers={self.layers} are no rising layers; write for example (6, 12, 18)")

    def stages_of(self, model: ModelSpec) -> tuple[int, ...]:
        """The layers in this encoder in front of which tokens are transformed."""
        blocks = model.feature_layer + 1
        if self.layers is None:
            return tuple(sorted({max(1, blocks * quarter // 4) for quarter in (1, 2, 3)}))
        if not 1 <= self.layers[0] <= self.layers[-1] <= blocks:
            raise UnsupportedMethod(
                f"layers={self.layers}: this {model.family} encoder has {blocks} blocks up to its features; choose "
                f"among 1 to {blocks}"
            )
        return self.layers

    def plan(self, model: ModelSpec) -> Plan:
        reading = model.patch_attention
        return inside_plan("'token_transforming'", model, reading, self.stages_of(model), attention=True)

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, EncoderStage)
        items, layer, stages = view.items, view.stage.layer, self.stages_of(view.model)
        tokens, number = even(view), stages.index(layer)
        start, keep = view.memory.setdefault(self, (tokens, view.keep[0]))
        left = round(start * (keep / start) ** ((number + 1) / len(stages)))
        if left == tokens:
            return None
        score = view.vision_attention(layer - 1, view.model.patch_attention)
        anchors = front_pack(top_k(score, torch.full_like(items.row, left)), left)
        rows = torch.bmm(self.matrix(view.tokens, anchors), view.tokens.float()).to(view.tokens.dtype)
        return merged_inside(view, rows, items.token.gather(1, anchors), None)

    def matrix(self, tokens: Tensor, anchors: Tensor) -> Tensor:
        """[G, k, t] W for tokens [G, t, D] and the places of the anchors among them [G, k]; its rows sum to one."""
        if self.mode == "o2o":
            return functional.one_hot(anchors, tokens.shape[1]).float()
        unit = functional.normalize(tokens.float() if self.mode == "m2m" else tokens.detach().float(), dim=-1)
        alike = take_rows(unit, anchors) @ unit.transpose(1, 2)
        if self.mode == "m2m":
            return (alike / self.tau).softmax(-1)
        into = first_best(alike.transpose(1, 2), ALIKE).scatter(1, anchors, _places(anchors))
        joins = functional.one_hot(into, anchors.shape[1]).transpose(1, 2).float()
        return joins / joins.sum(2, keepdim=True)


def _places(anchors: Tensor) -> Tensor:
    return torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
