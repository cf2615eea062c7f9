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
from vtc.testing.between import Select, stand_between
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
        """[..., I, N] or [I, N, ...] with everything outside the items' mask replaced."""
        mask = self.items.mask
        mask = mask if values.shape[-2:] == mask.shape else mask.view(*mask.shape, *(1,) * (values.ndim - 2))
        noise = SIZE * torch.arange(values.numel(), device=values.device).cos().view(values.shape)
        return torch.where(mask, values, noise.to(values.dtype))


def _filled(select: Select, view: StageView) -> Selection | None:
    return select(FilledView(**{field.name: getattr(view, field.name) for field in dataclasses.fields(view)}))


def reads_padding(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    """Largest logit difference between a run and one with other values behind the items' ends."""
    _, expected = generate(model, inputs, attach(model), 1)
    handle = attach(model)
    stand_between(handle, _filled)
    _, found = generate(model, inputs, handle, 1)
    return float((found - expected).abs().max())
