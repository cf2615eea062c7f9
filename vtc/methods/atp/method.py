"""ATP-LLaVA: trained modules between LLM layers set thresholds for every image and question (arXiv:2412.00447)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.layout import item_lines
from vtc.method.learned import LearnedCompressor
from vtc.method.registry import register
from vtc.method.schedule import scaled
from vtc.methods.atp import thresholds
from vtc.ops.host import put
from vtc.ops.rank import dense_rank

Norm = Literal["minmax", "none"]
Feature = Literal["pool", "mean"]
Average = Literal["layers", "modules"]
DEPTHS = (4, 14, 24)
"""The published layers, in an LLM of 32."""
LINE = 1e-2
"""Coordinates this close lie on one line of the grid."""


@dataclass(frozen=True)
class Scores:
    """What one module sees, all [I, N]: normalised scores, their mean, the spatial score, which tokens are alive."""

    own: Tensor
    cross: Tensor
    redundancy: Tensor
    spatial: Tensor
    alive: Tensor


@dataclass(frozen=True)
class ATPScores(Compressor):
    """The scores that the learned and the training-free form share, and where both act."""

    layers: tuple[int, ...] | None = None
    score_norm: Norm = "minmax"
    strides: tuple[int, ...] = (2, 4, 8)
    lambda_sample: float = 3.0
    causal_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise VTCError(f"layers={self.layers!r} are no ascending layer numbers; write for example (4, 14, 24)")
        if self.layers is not None and self.layers[0] < 0:
            raise VTCError(f"layers={self.layers!r} begin below 0; layers are counted from 0, for example (4, 14, 24)")
        if not self.strides or min(self.strides) < 1:
            raise VTCError(f"strides={self.strides!r} hold no step of at least 1; write for example (2, 4, 8)")
        if self.lambda_sample < 0:
            raise VTCError(f"lambda_sample={self.lambda_sample} is negative; the published value is 3.0")

    def module_layers(self, model: ModelSpec) -> tuple[int, ...]:
        """The LLM layers after which the modules sit: `layers`, or the published ones scaled to the model's depth."""
        depth = model.llm_layers
        if self.layers is None:
            chosen = scaled(DEPTHS, depth, last=depth - 2, nearest=math.floor)
            if not chosen:
                raise UnsupportedMethod(f"{self.name!r} prunes between LLM layers; this {model.family} model has one")
            return chosen
        if self.layers[-1] >= depth - 1:
            raise UnsupportedMethod(
                f"layers={self.layers} of {self.name!r} must lie before the last layer of this {model.family} model; "
                f"choose among 0 to {depth - 2}, or leave them out"
            )
        return self.layers

    def plan(self, model: ModelSpec) -> Plan:
        layers = self.module_layers(model)
        return Plan(tuple(at + 1 for at in layers), Needs(llm=dict.fromkeys(layers, Rows.GROUP_SUMS)), "preserve")

    def scores(self, view: StageView, alive: Tensor) -> Scores:
        """Scores after the layer in front of the view's stage; `alive` [I, N] are the tokens that set the scale."""
        assert isinstance(view.stage, int)
        from_text, from_visual = view.llm_attention(view.stage - 1)  # [I, N] each
        rows = view.items.row[:, None]
        cross = from_text / view.asking.sum(1)[rows].clamp(min=1)
        seen_by = view.visual.sum(1)[rows]
        if self.causal_correction:
            seen_by = view.visual.flip(1).cumsum(1).flip(1)[rows, view.items.index]
        own = from_visual / seen_by.clamp(min=1)
        if self.score_norm == "minmax":
            own, cross = thresholds.min_max(own, alive), thresholds.min_max(cross, alive)
        spatial = thresholds.spatial_score(*self.places(view), self.strides, self.lambda_sample)
        return Scores(own, cross, thresholds.redundancy_score(own, cross), spatial, alive)

    def places(self, view: StageView) -> tuple[Tensor, Tensor]:
        """[I, N] row and column of each token on the grid that its crop or frame had in the input."""
        if (self.name, "grid") not in view.memory:
            view.memory[self.name, "grid"] = self._lines(view)
        row, col = (line.to(view.device) for line in view.memory[self.name, "grid"])
        return row.gather(1, view.items.token), col.gather(1, view.items.token)

    @staticmethod
    def _lines(view: StageView) -> Sequence[Tensor]:
        """Row and column of each token of the input, [I, Nin] each."""
        layouts, device = view.items.layouts, view.device
        if all(item.framed and not item.newlines for item in layouts):
            return item_lines(layouts, device)[:2]
        crop = pad_sequence([item.crop for item in layouts], batch_first=True, padding_value=-1)
        axes = [pad_sequence([getattr(item, axis) for item in layouts], batch_first=True) for axis in ("row", "col")]
        crop, row, col = (each.to(device, non_blocking=True) for each in (crop, *axes))
        return dense_rank(row, crop, LINE), dense_rank(col, crop, LINE)

    @abstractmethod
    def select(self, view: StageView) -> Selection | None:
        """Apply thresholds or a budget to `scores`."""


class ThresholdModule(nn.Module):
    """Two vectors of scores -> redundancy and spatial threshold, each in (0, 1).

    bins: length to which the vectors are pooled; None takes their means. It starts with nearly everything kept.
    """

    def __init__(self, bins: int | None, hidden: int, relu: bool) -> None:
        super().__init__()
        self.bins, self.relu = bins, relu
        self.shared = nn.Linear(2 * (bins or 1), hidden)
        self.head_r, self.head_s = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        nn.init.xavier_uniform_(self.shared.weight)
        nn.init.zeros_(self.shared.bias)
        for head, bias in ((self.head_r, -3.0), (self.head_s, 3.0)):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)

    def forward(self, own: Tensor, cross: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """[I, N] scores, of which the `alive` ones count -> theta_r [I], theta_s [I]."""
        device = self.shared.weight.device
        if self.bins is None:
            features = torch.stack([thresholds.masked_mean(each, alive) for each in (own, cross)], dim=1)
        else:
            features = torch.cat([thresholds.pool_bins(each, alive, self.bins) for each in (own, cross)], dim=1)
        hidden = self.shared(features.to(device))
        hidden = hidden.relu() if self.relu else hidden
        theta_r, theta_s = self.head_r(hidden).sigmoid()[:, 0], self.head_s(hidden).sigmoid()[:, 0]
        return theta_r.to(own.device), theta_s.to(own.device)


class ThresholdModules(nn.Module):
    """One part per LLM layer, under the stored names `atp.layer{l}`."""

    def __init__(self, parts: dict[int, nn.Module]) -> None:
        super().__init__()
        self.atp = nn.ModuleDict({f"layer{layer}": part for layer, part in parts.items()})

    def part(self, layer: int) -> nn.Module:
        """The part that sits after this layer."""
        return self.atp[f"layer{layer}"]


@register
class ATP(LearnedCompressor, ATPScores):
    """Drop visual tokens inside the LLM that fall below two learned thresholds, set anew for every image and question.

    Acts before the LLM layer that follows each of `layers`; learned; text-aware. At LLM layer l, with A the head mean
    of the attention: ``S_self(j) = mean_i A[i, j]`` over the visual rows (eq. 3), ``S_cross(j)`` over the text rows
    (eq. 4), each scaled to [0, 1] over the tokens still there; ``S_red = (S_self + S_cross) / 2``. The spatial score
    (eq. 5) is ``1 - lambda_sample / s^2`` for tokens on a sampling grid of stride s of their crop, 0 elsewhere. A small
    network reads both score vectors and gives theta_r and theta_s (eq. 6-8); a token stays if ``S_red > theta_r or
    S_spatial > theta_s`` (eq. 9-11). How many stay differs by image, question and layer, so no retention can be given:
    the weights were trained towards a mean, `handle.stats` says what was reached.

    layers: LLM layers after which a module sits (4, 14, 24 of 32; scaled to other depths when left out). score_norm:
    "minmax", or "none" for raw probabilities. strides, lambda_sample: sampling grids ((2,) is one grid) and the weight
    of their rate. causal_correction: divide what a token receives by the visual rows that can see it, not by all.
    feature: "pool" averages each score vector into `bins` bins, "mean" into one number. hidden: width of the network
    (256 for "pool", the model's for "mean" when left out). relu: on after the first layer; when left out, with "pool"
    only. weights: safetensors file or embedded name; training: soft masks with gradients instead of removal.
    The rest serves training: temperature of the soft masks; loss ``lambda_atp * sum_m l_m * kept_m / N0 + lambda_target
    * |mean - target_tokens|`` (eq. 12-14) with the mean taken over all "layers" or over the "modules" (`average`);
    normalise_target divides that distance by N0.

    Departures from the paper and its code: no official code is known and the published text leaves scales open, so
    min-max scaling, the nested grids, the pooled features and the mean over layers are choices of this library;
    text rows are those of the question, never the answer; every image of a prompt gets thresholds of its own;
    separators stay, and their rows count as visual rows; if nothing passes, the best token of S_red stays; soft masks
    weigh the keys of all later layers and are floored at 1e-6; in training, tokens below a mask of 0.5 set no scale but
    their rows still count in S_self; original positions are kept, without an additional two-dimensional embedding.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("atp", layers=(4, 14)).plan(llava).stages
    (5, 15)
    """

    feature: Feature = "pool"
    bins: int = 256
    hidden: int | None = None
    relu: bool | None = None
    temperature: float = 10.0
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    target_tokens: float = 144.0
    average: Average = "layers"
    normalise_target: bool = False

    name: ClassVar[str] = "atp"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bins", "hidden", "temperature", "target_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise VTCError(f"{name}={value} must be above 0")

    @property
    def needs_budget(self) -> bool:
        """False: the weights decide."""
        return False

    def build(self, model: ModelSpec) -> ThresholdModules:
        pool = self.feature == "pool"
        bins, relu = (self.bins if pool else None), (pool if self.relu is None else self.relu)
        parts = {at: ThresholdModule(bins, self._hidden(model), relu) for at in self.module_layers(model)}
        return ThresholdModules(dict(parts))

    def _hidden(self, model: ModelSpec) -> int:
        return self.hidden or (256 if self.feature == "pool" else max(1, model.width))

    def settings(self, model: ModelSpec) -> dict[str, str]:
        relu = self.feature == "pool" if self.relu is None else self.relu
        return {
            "method": "atp_llava",
            "num_layers": str(model.llm_layers),
            "layers": ",".join(map(str, self.module_layers(model))),
            "feature": self.feature,
            "bins": str(self.bins if self.feature == "pool" else 1),
            "hidden": str(self._hidden(model)),
            "relu": str(relu).lower(),
            "score_norm": self.score_norm,
            "strides": ",".join(map(str, self.strides)),
            "lambda_sample": str(float(self.lambda_sample)),
            "causal_correction": str(self.causal_correction).lower(),
        }

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int) and isinstance(view.module, ThresholdModules)
        if view.items.mask.shape[1] == 0:
            return None
        before: Tensor = view.memory.get((self.name, "product"), view.items.mask.float())
        before = before.to(view.device)
        scores = self.scores(view, before > 0.5 if self.training else view.items.mask)
        module = view.module.part(view.stage - 1)
        theta: tuple[Tensor, Tensor] = module(scores.own, scores.cross, scores.alive)
        if not self.training:
            return Selection(thresholds.hard_keep(scores.redundancy, scores.spatial, *theta, view.items.mask))
        product = before * thresholds.soft_keep(scores.redundancy, scores.spatial, *theta, self.temperature)
        view.memory[self.name, "product"] = product
        weights = product.clamp(min=thresholds.FLOOR) / before.clamp(min=thresholds.FLOOR)
        weights = torch.where(view.items.mask, weights, 1.0)
        return Selection(view.items.mask, counts=view.items.counts, weights=weights, loss=self._loss(view, product))

    def _loss(self, view: StageView, product: Tensor) -> Tensor:
        """This module's share of the loss; the last one adds the distance from the target."""
        layers, items = self.module_layers(view.model), view.items
        fixed = put(items.fixed, product.device)
        tokens = put(items.entered, product.device) + fixed.float()
        kept: list[Tensor] = view.memory.setdefault((self.name, "kept"), [])
        kept.append(product.sum(1) + fixed)
        at = layers[len(kept) - 1]
        loss = self.lambda_atp * thresholds.depth_loss(kept[-1][None], tokens, (at,))
        if at != layers[-1]:
            return loss
        behind = torch.stack([each.to(product.device) for each in kept])
        if self.average == "layers":
            mean = thresholds.mean_over_layers(behind, tokens, layers, view.model.llm_layers)
        else:
            mean = behind.mean(0)
        scale = tokens.mean() if self.normalise_target else 1.0
        return loss + self.lambda_target * thresholds.target_loss(mean, self.target_tokens) / scale
