"""ATP scores without training: exact counts per sample, or constant thresholds from a calibration."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from vtc.errors import UnsupportedMethod, VTCError
from vtc.method import weights as store
from vtc.method.base import ModelSpec, Plan, Selection, StageView
from vtc.method.learned import check_settings, load_tensors
from vtc.method.registry import register
from vtc.methods.atp import thresholds
from vtc.methods.atp.method import ATPScores, ThresholdModules
from vtc.ops.host import put

Mode = Literal["budget", "calibrated"]


class Constants(nn.Module):
    """Thresholds of one module that are the same for every sample."""

    def __init__(self, theta_r: float = 0.0, theta_s: float = 1.0) -> None:
        super().__init__()
        self.theta_r = nn.Parameter(torch.tensor([theta_r]), requires_grad=False)
        self.theta_s = nn.Parameter(torch.tensor([theta_s]), requires_grad=False)


@register
class ATPTrainingFree(ATPScores):
    """ATP scores, training-free: the scores of `atp` with exact counts or calibrated constants; not ATP-LLaVA itself.

    Acts before the LLM layer that follows each of `layers`; text-aware. Scores as in `atp`. With mode="budget" every
    item keeps ``k_m = max(1, floor(N0 * alpha^m))`` tokens behind module m, alpha in [0, 1] such that the mean over the
    LLM's layers meets the retention. Of the k_m, at most a share `spatial_share` are the tokens of the densest sampling
    grid that fits, the rest have the largest S_red; ties go to the lower index. A mean below what the layers up to the
    first module use cannot be met and is refused. With mode="calibrated" tokens stay if ``S_red > theta_r or
    S_spatial > theta_s``, both constants from a calibration; counts follow the sample, no
    retention can be given.

    layers, score_norm, strides, lambda_sample, causal_correction: as in `atp`. spatial_share: of the kept tokens, at
    most this part comes from the grid. shares: what is left behind each module as fractions of N0, in place of the
    decay; then no retention is given. weights: the calibration's safetensors file or embedded name.

    Departures from the paper and its code: the paper has no form without training; reported under its own name.
    Separators stay and count against the budget.

    >>> import vtc
    >>> llava = vtc.adapters.families()["llava"].references[0]  # 24 and 32 layers
    >>> vtc.create("atp_training_free").plan(llava).stages
    (5, 15, 25)
    >>> vtc.create("atp_training_free").least_retention(llava)
    0.15625
    """

    mode: Mode = "budget"
    spatial_share: float = 0.25
    shares: tuple[float, ...] | None = None
    weights: str | os.PathLike[str] | None = None

    name: ClassVar[str] = "atp_training_free"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares is not None:
            falling = list(self.shares) == sorted(self.shares, reverse=True)
            if not self.shares or not falling or not 0 < self.shares[-1] <= self.shares[0] <= 1:
                raise VTCError(f"shares={self.shares} do not fall within (0, 1]; write for example (0.5, 0.2, 0.1)")
            if self.mode != "budget":
                raise VTCError("shares fix the counts, a calibration the thresholds; leave one of them out")
        if not 0 <= self.spatial_share <= 1:
            raise VTCError(f"spatial_share={self.spatial_share} is outside [0, 1]; the default is 0.25")
        if self.mode == "calibrated" and self.weights is None:
            raise VTCError(
                "mode='calibrated' needs constants and none were given; pass weights=<a safetensors file> as "
                "`vtc calibrate` writes it, or choose mode='budget'"
            )
        if self.mode == "budget" and self.weights is not None:
            raise VTCError(f"weights={self.weights!r} have no use with mode='budget'; write mode='calibrated'")

    @property
    def needs_budget(self) -> bool:
        """True with mode="budget", unless `shares` say what is left."""
        return self.mode == "budget" and self.shares is None

    def plan(self, model: ModelSpec) -> Plan:
        layers = self.module_layers(model)
        if self.shares is not None and len(self.shares) != len(layers):
            raise UnsupportedMethod(
                f"{len(self.shares)} shares were given for {len(layers)} modules behind layers {layers} of this "
                f"{model.family} model; give one for each"
            )
        return super().plan(model)

    def build(self, model: ModelSpec) -> ThresholdModules:
        """Constants that keep every token."""
        return ThresholdModules({at: Constants(theta_r=-1.0) for at in self.module_layers(model)})

    def settings(self, model: ModelSpec) -> dict[str, str]:
        """What a calibration depends on."""
        return {
            "method": self.name,
            "num_layers": str(model.llm_layers),
            "layers": ",".join(map(str, self.module_layers(model))),
            "score_norm": self.score_norm,
            "strides": ",".join(map(str, self.strides)),
            "lambda_sample": str(float(self.lambda_sample)),
            "causal_correction": str(self.causal_correction).lower(),
        }

    def described(self) -> dict[str, Any]:
        given = super().described()
        return given if self.weights is None else {**given, "weights_digest": store.digest(self.weights)}

    def module(self, model: ModelSpec) -> nn.Module | None:
        if self.weights is None:
            return None
        module = self.build(model)
        tensors, metadata = store.read(self.weights)
        check_settings(str(self.weights), metadata, self.settings(model))
        load_tensors(str(self.weights), module, tensors)
        return module

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        mask = view.items.mask
        if mask.shape[1] == 0:
            return None
        if self.mode == "calibrated":
            return self._calibrated(view, view.stage - 1)
        module = self.module_layers(view.model).index(view.stage - 1)
        counts = [min(left[module], now) for left, now in zip(self._schedule(view), view.items.counts, strict=True)]
        keep = put(counts, mask.device)
        scores = self.scores(view, mask)
        row, col = self.places(view)
        grid = thresholds.sampling_grid(row, col, self.strides, self.spatial_share, keep, mask)
        return Selection(thresholds.budget_keep(scores.redundancy, grid, keep, mask), counts=counts)

    def _calibrated(self, view: StageView, layer: int) -> Selection:
        assert isinstance(view.module, ThresholdModules)
        part = view.module.part(layer)
        assert isinstance(part, Constants)
        scores = self.scores(view, view.items.mask)
        theta_r, theta_s = (theta.to(view.device).expand(len(view.items)) for theta in (part.theta_r, part.theta_s))
        kept = thresholds.hard_keep(scores.redundancy, scores.spatial, theta_r, theta_s, view.items.mask)
        return Selection(kept)

    def _schedule(self, view: StageView) -> list[list[int]]:
        """[I][M] tokens of every item behind every module, computed on the host once per call."""
        items, model = view.items, view.model
        if self.shares is not None:
            return [[max(1, math.floor(n * share + 0.5)) for share in self.shares] for n in items.entered]
        if (self.name, "schedule") not in view.memory:
            layers, depth = self.module_layers(model), model.llm_layers
            columns = zip(items.entered, view.granted, items.fixed, items.input_counts, strict=True)
            view.memory[self.name, "schedule"] = [
                thresholds.decay_counts(now, mean, layers, depth, fixed=fixed, of=given)
                for now, mean, fixed, given in columns
            ]
        found: list[list[int]] = view.memory[self.name, "schedule"]
        return found
