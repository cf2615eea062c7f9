"""Constant thresholds for ATP scores from a set of prompts, without any training.

Module by module, with the earlier modules active: theta_s lies just below the score of the sampling grid that the
budget mode would take for the mean count, and theta_r is the quantile of S_red of all other tokens for which grid and
passing tokens together average the count of the schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtc
from vtc import adapters
from vtc.errors import BudgetError, VTCError
from vtc.eval.progress import SilentProgress
from vtc.eval.training.calibrations import Calibration
from vtc.method.base import ModelSpec, Selection, StageView
from vtc.method.registry import create
from vtc.methods.atp import thresholds
from vtc.methods.atp.method import ThresholdModules
from vtc.methods.atp.training_free import ATPTrainingFree, Constants


@dataclass
class _Pool:
    """What a module saw: S_red, row, column of every alive token, [n] each; items, and the tokens they began with."""

    redundancy: list[Tensor] = field(default_factory=list)
    row: list[Tensor] = field(default_factory=list)
    col: list[Tensor] = field(default_factory=list)
    items: int = 0
    tokens: int = 0
    fixed: int = 0


@dataclass(frozen=True)
class _Probe(ATPTrainingFree):
    """The calibrated form under construction; notes what the module after `layer` sees and drops nothing there."""

    parts: ThresholdModules | None = None
    layer: int = -1
    pool: _Pool = field(default_factory=_Pool)

    name: ClassVar[str] = "atp_training_free"

    def __post_init__(self) -> None:
        """Fields were checked when the method was built."""

    def module(self, model: ModelSpec) -> nn.Module | None:
        return self.parts

    def select(self, view: StageView) -> Selection | None:
        assert isinstance(view.stage, int)
        if view.stage - 1 < self.layer:
            return super().select(view)
        if view.stage - 1 == self.layer:
            mask = view.items.mask
            row, col = self.places(view)
            self.pool.redundancy.append(self.scores(view, mask).redundancy[mask].cpu())
            self.pool.row.append(row[mask].cpu())
            self.pool.col.append(col[mask].cpu())
            self.pool.items += len(view.items)
            self.pool.tokens += sum(view.items.entered)
            self.pool.fixed += sum(view.items.fixed)
        return None


@torch.no_grad()
def calibrate(
    model: nn.Module,
    prompts: Iterable[dict[str, Any]],
    retention: float,
    method: ATPTrainingFree | None = None,
    progress: SilentProgress | None = None,
) -> dict[str, Tensor]:
    """Thresholds under their stored names, for `prompts` as the model takes them; one pass per module and prompt.

    retention: wanted mean over layers and prompts. method: hyper-parameters; defaults if left out. Raises BudgetError
    when the layers up to the first module alone use more.
    """
    method = method or ATPTrainingFree()
    spec = adapters.of(model).spec
    prompts, layers = list(prompts), method.module_layers(spec)
    parts = ThresholdModules({at: Constants(theta_r=-1.0) for at in layers})
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)} | {"mode": "calibrated"}
    progress = progress or SilentProgress()
    progress.start(len(layers) * len(prompts), 0, "passes")
    with progress:
        for index, layer in enumerate(layers):
            probe = _Probe(**options, parts=parts, layer=layer)
            with vtc.compress(model, probe, trace=False):
                for prompt in prompts:
                    model(**prompt)
                    progress.advance(1)
            wanted = _count(probe.pool, retention, layers, spec.llm_layers, index)
            part = parts.part(layer)
            assert isinstance(part, Constants)
            theta_r, theta_s = _constants(probe, wanted)
            part.theta_r.fill_(theta_r)
            part.theta_s.fill_(theta_s)
    return parts.state_dict()


def _count(pool: _Pool, retention: float, layers: Sequence[int], depth: int, index: int) -> float:
    """Mean tokens per item behind module number `index`, unrounded, at least one."""
    tokens, fixed = pool.tokens / pool.items, pool.fixed / pool.items
    granted = retention * (tokens + fixed)
    try:
        return max(1.0, thresholds.decay(tokens, granted, layers, depth, fixed=fixed)[index])
    except BudgetError as error:
        raise BudgetError(f"retention={retention:g} of these prompts: {error}") from None


def _constants(probe: _Probe, wanted: float) -> tuple[float, float]:
    """theta_r and theta_s for a mean of `wanted` tokens per item."""
    pool = probe.pool
    redundancy, row, col = (torch.cat(each)[None] for each in (pool.redundancy, pool.row, pool.col))
    theta_s = 1.0
    for stride in sorted(probe.strides, reverse=True):
        if thresholds.on_grid(row, col, stride).sum().item() <= probe.spatial_share * wanted * pool.items:
            theta_s = max(0.0, 1 - probe.lambda_sample / stride**2 - 1e-4)
    spatial = thresholds.spatial_score(row, col, probe.strides, probe.lambda_sample)
    others = redundancy[spatial <= theta_s].sort(descending=True).values
    passing = round(wanted * pool.items) - (redundancy.numel() - len(others))
    if passing >= len(others):
        return -1.0, theta_s
    return float(others[max(0, passing)]), theta_s


def calibration(retention: float | None, parameters: Mapping[str, Any]) -> Calibration:
    """Thresholds that reach `retention` on average over the prompts."""
    if retention is None:
        raise VTCError("thresholds of atp_training_free are made for one retention; write for example --retention 0.33")
    method, wanted = create("atp_training_free", **parameters), retention
    if not isinstance(method, ATPTrainingFree) or method.mode != "budget":
        raise VTCError("a calibration makes the constants itself; leave mode and weights out")

    def measure(
        model: nn.Module, prompts: Iterable[dict[str, Any]], progress: SilentProgress | None
    ) -> dict[str, Tensor]:
        return calibrate(model, prompts, wanted, method, progress)

    notes = {"retention": str(retention), "spatial_share": str(method.spatial_share)}
    return Calibration(method, measure, notes)
