"""FitPrune: behind every layer of the LLM, what image and question attend to least leaves (arXiv:2409.10197)."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method import weights as store
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Selection, StageView
from vtc.method.budget import left_by_stages
from vtc.method.learned import check_settings, load_tensors
from vtc.method.readings import AttentionCall, LLMReading, QueryRows
from vtc.method.registry import register
from vtc.methods.fitprune.recipe import Recipe, spread
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
class FitPrune(Compressor):
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
    drops the same share, which is ours. rates: what is left behind each layer but the last, as shares of the tokens
    given to the LLM; then no retention or keep is given and round(N * rate) of N tokens stay, at least one.

    Departures from the paper and its code: tokens leave behind a layer and not between its attention and its MLP; a
    budget is a mean over the layers, where the paper has a reduction of the operations; recipes are made for a hundred
    alpha and every budget lies between two of them; the rows of all images of a prompt count for self; newline tokens
    stay; without text behind the image self alone ranks.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> len(vtc.create("fitprune").plan(llava).stages)
    31
    >>> vtc.create("fitprune", rates=(1.0,) * 15 + (0.5,) * 16).needs_budget
    False
    """

    rates: tuple[float, ...] | None = None
    weights: str | os.PathLike[str] | None = None

    name: ClassVar[str] = "fitprune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates is not None and self.weights is not None:
            raise VTCError(
                f"rates and weights={os.fspath(self.weights)!r} both say what layers leave; leave one of them out"
            )
        if self.weights is not None:
            store.find(self.weights)
        if self.rates is not None and (
            not self.rates
            or list(self.rates) != sorted(self.rates, reverse=True)
            or not 0 < self.rates[-1] <= self.rates[0] <= 1
        ):
            raise VTCError(
                f"rates={self.rates!r} must fall within (0, 1], one for each layer of the LLM but the last; write for "
                "example (1.0, 0.5, 0.5) for four layers"
            )

    @property
    def needs_budget(self) -> bool:
        return self.rates is None

    def plan(self, model: ModelSpec) -> Plan:
        layers = model.llm_layers - 1
        if layers < 1:
            raise UnsupportedMethod(
                f"the LLM of this {model.family} model has one layer; nothing can be dropped inside"
            )
        if self.rates is not None and len(self.rates) != layers:
            raise UnsupportedMethod(
                f"{len(self.rates)} rates were given, this {model.family} model's LLM has {layers + 1} layers; give "
                f"{layers}, one for each but the last"
            )
        return Plan(tuple(range(1, layers + 1)), Needs(llm=dict.fromkeys(range(layers), SUMS)), "preserve")

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
        recipe.rows = tuple(map(tuple, recipe.left.tolist()))
        return recipe

    @torch.no_grad()
    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        items, layer = view.items, view.stage - 1
        if self not in view.memory:
            granted = view.granted if self.needs_budget else items.entered
            columns = zip(items.entered, granted, items.fixed, items.input_counts, strict=True)
            view.memory[self] = [self.left(view, *item) for item in columns]
        counts = tuple(min(now, left[layer]) for now, left in zip(items.counts, view.memory[self], strict=True))
        if counts == items.counts:
            return None
        scores = view.llm_attention(layer, SUMS).prod(0)
        marks = top_k(scores, put(counts, view.device), items.gaps, most=max(counts))
        return Selection(marks, counts=counts, scores=scores)

    def left(self, view: StageView, entered: int, granted: int, fixed: int, given: int) -> tuple[int, ...]:
        """Tokens of an item left behind each layer but the last."""
        layers = view.model.llm_layers
        if self.rates is not None:
            return tuple(min(entered, max(1, math.floor(entered * rate + 0.5))) for rate in self.rates)
        if granted >= entered + fixed:
            return (entered,) * (layers - 1)
        if isinstance(view.module, Recipe):
            return spread(view.module.rows, entered, granted, fixed, given)
        return left_by_stages(entered, 1, granted, fixed, given, (1,) * layers)
