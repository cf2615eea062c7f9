"""FitPrune: behind every layer of the LLM, what image and question attend to least leaves (arXiv:2409.10197)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.method import weights as store
from vtc.method.base import ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.learned import check_settings, load_tensors
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.method.registry import register
from vtc.method.schedule import Profiles, Schedule
from vtc.method.staged import ScheduledCompressor, several
from vtc.methods.fitprune.recipe import Recipe
from vtc.ops.attention import attention_sums
from vtc.ops.host import put
from vtc.ops.select import top_k


@dataclass(frozen=True)
class HeadMaxSums(LLMReading):
    """Softmax attention, the largest over heads, summed over the visual rows and over the text behind them: [2, B, K].

    The text is that behind a row's first visual token; where none stands there, the second sums are 1.
    """

    name: ClassVar[str] = "largest over heads, visual and text rows"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length**2 * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        asking = rows.asking
        weights = torch.stack([rows.visual, asking]).float()
        query, key, scaling = attention.query, attention.key, attention.scaling
        own, cross = attention_sums(query, key, weights, scaling, mask=rows.mask, causal=True, heads="max")
        return torch.stack([own, torch.where(asking.any(1, keepdim=True), cross, 1)])


SUMS = HeadMaxSums()


@register
class FitPrune(ScheduledCompressor):
    """Behind every layer of the LLM, drop the visual tokens that neither image nor question attends to.

    Acts inside the LLM, behind all layers but the last; training-free, follows the question. With M_ij the largest over
    heads of layer l's attention, ``self_j = sum_i M_ij`` over the visual rows i and ``cross_j = sum_i M_ij`` over the
    text behind the image, the tokens of smallest ``self_j cross_j`` leave behind layer l, and the others keep their
    positions. Ties: the lower index stays. How many leave where comes from a calibration: of the tokens
    still there, the largest sets with at most a share alpha of what all tokens receive in that layer of the unpruned
    model are taken by self and by cross, and what lies in both leaves; the means over prompts are a recipe for that
    alpha.

    weights: the file of a calibration, which has the recipes of all alpha, as `vtc calibrate --method fitprune` writes
    it; the one is used whose mean over all layers meets the budget. By default, without a calibration, every layer
    drops the same share, which is ours. schedule: instead of a calibration, such as "sigmoid(8)", "cosine" or a rate
    for every layer, which takes no budget: (1, 0.8, 0.5) leaves 80 % behind the first of three layers.

    Departures from the paper and its code: tokens leave behind a layer and not between its attention and its MLP; a
    budget is a mean over the layers, where the paper has a reduction of the operations; recipes are made for a hundred
    alpha and every budget lies between two of them; the rows of all images of a prompt count for self; newline tokens
    stay; without text behind the image self alone ranks.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> len(vtc.create("fitprune").plan(llava).stages)
    31
    >>> vtc.create("fitprune", schedule=(1.0,) * 16 + (0.5,) * 16).plan(llava).stages
    (16,)
    """

    weights: str | os.PathLike[str] | None = None

    name: ClassVar[str] = "fitprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alone("weights")
        if self.weights is not None:
            store.find(self.weights)

    def schedules(self, model: ModelSpec) -> tuple[Schedule, ...]:
        layers = several(model)
        return super().schedules(model) or (Schedule(tuple(range(1, layers)), layers),)

    def plan(self, model: ModelSpec) -> Plan:
        starts = self.starts(model)
        return Plan(starts, Needs(llm={start - 1: SUMS for start in starts}), "preserve")

    def settings(self, model: ModelSpec) -> dict[str, str]:
        """What a calibration depends on."""
        return {"method": self.name, "num_layers": str(model.llm_layers)}

    def described(self) -> dict[str, Any]:
        given = super().described()
        return given if self.weights is None else {**given, "weights_digest": store.digest(self.weights)}

    def module(self, model: ModelSpec) -> Recipe | None:
        if self.weights is None:
            return None
        recipe = Recipe(model.llm_layers)
        tensors, metadata = store.read(self.weights)
        check_settings(str(self.weights), metadata, self.settings(model))
        load_tensors(str(self.weights), recipe, tensors)
        recipe.profiles = Profiles(tuple(map(tuple, recipe.left.tolist())))
        return recipe

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        recipe, schedules = view.module, self.schedules(view.model)
        if isinstance(recipe, Recipe):
            schedules = tuple(dataclasses.replace(each, shares=recipe.profiles) for each in schedules)
        counts = self.left(view, view.stage, schedules)
        if counts == view.items.counts:
            return None
        scores = view.llm_attention(view.stage - 1, SUMS).prod(0)
        marks = top_k(scores, put(counts, view.device), view.items.gaps, most=max(counts))
        return Selection(marks, counts=counts, scores=scores)
