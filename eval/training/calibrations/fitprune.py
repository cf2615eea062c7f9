"""The recipe of FitPrune from a set of prompts: what each layer of the untouched model could do without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtc
from vtc.errors import VTCError
from vtc.eval.progress import SilentProgress
from vtc.eval.training.calibrations import Calibration
from vtc.method.base import Selection, StageView
from vtc.methods.fitprune.method import SUMS, FitPrune
from vtc.methods.fitprune.recipe import left_behind, recipe


@dataclass(frozen=True)
class _Probe(FitPrune):
    """Drops nothing and notes of every item what could leave behind each layer. counts: [A, L, I], tokens: [I]."""

    counts: list[Tensor] = field(default_factory=list, compare=False)
    tokens: list[Tensor] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "fitprune"

    @property
    def needs_budget(self) -> bool:
        return False

    def select(self, view: StageView) -> Selection | None:
        last = view.model.llm_layers - 1
        if view.stage == last:
            own, cross = torch.stack([view.llm_attention(layer, SUMS) for layer in range(last)], 1)
            self.counts.append(left_behind(own, cross, view.items.mask).cpu())
            self.tokens.append(view.items.mask.sum(1).cpu())
        return None


@torch.no_grad()
def calibrate(
    model: nn.Module, prompts: Iterable[dict[str, Any]], progress: SilentProgress | None = None
) -> dict[str, Tensor]:
    """The recipe under its stored name, for `prompts` as the model takes them; one pass each, nothing is dropped.

    Every image or video of a prompt counts once. Raises VTCError where the prompts have none.
    """
    probe, progress, prompts = _Probe(), progress or SilentProgress(), list(prompts)
    progress.start(len(prompts), 0, "passes")
    with progress, vtc.compress(model, probe, trace=False):
        for prompt in prompts:
            model(**prompt)
            progress.advance(1)
    if not probe.counts:
        raise VTCError("the prompts of the calibration hold no image or video; give prompts with pictures")
    return {"left": recipe(torch.cat(probe.counts, 2), torch.cat(probe.tokens)).float()}


def calibration(retention: float | None, parameters: Mapping[str, Any]) -> Calibration:
    """One recipe for every retention."""
    if retention is not None or parameters:
        raise VTCError(
            "a recipe of fitprune serves every retention and has no options; leave --retention and --set out"
        )
    return Calibration(FitPrune(), calibrate)
