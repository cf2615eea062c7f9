"""Whether a method reads what stands behind an item's end, where smaller items are padded to the largest one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtc.method.readings import LLMReading, VisionReading
from vtc.method.view import Selection, StageView
from vtc.testing.measures import Attach, generate

SIZE = 1e3
"""Values behind an item's end, of both signs: a mean, a largest and a smallest value all change with them."""


@dataclass(frozen=True, eq=False)
class FilledView(StageView):
    """The view with conspicuous values behind every item's end."""

    @cached_property
    def tokens(self) -> Tensor:
        return self._fill(super().tokens)

    def vision_attention(self, layer: int, reading: VisionReading | None = None) -> Tensor:
        return self._fill(super().vision_attention(layer, reading))

    def llm_attention(self, layer: int, reading: LLMReading | None = None) -> Tensor:
        return self._fill(super().llm_attention(layer, reading))

    def _fill(self, values: Tensor) -> Tensor:
        """[..., I, N] or [I, N, C] with everything outside the items' mask replaced."""
        mask = self.items.mask
        mask = mask if values.shape[-2:] == mask.shape else mask[..., None]
        noise = SIZE * torch.arange(values.numel(), device=values.device).cos().view(values.shape)
        return torch.where(mask, values, noise.to(values.dtype))


class _Filled:
    """A method that is shown filled views; everything else is its own."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def select(self, view: StageView) -> Selection | None:
        fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
        found: Selection | None = self._method.select(FilledView(**fields))
        return found


def reads_padding(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    """Largest logit difference between a run and one with other values behind the items' ends."""
    _, expected = generate(model, inputs, attach(model), 1)
    handle = attach(model)
    stages: Any = handle._engine.stages
    for runner in (stages, stages.encoder):
        if runner is not None:
            runner.method = _Filled(runner.method)
    _, found = generate(model, inputs, handle, 1)
    return float((found - expected).abs().max())
