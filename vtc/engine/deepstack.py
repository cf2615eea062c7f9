"""Visual rows that some models add to the hidden states of the first LLM layers (Qwen3-VL).

The model indexes them by a mask over the whole prompt, which no longer fits once tokens are gone. The engine therefore
takes them over and adds the surviving rows itself, in front of the next layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.ops.select import take_last


@dataclass(frozen=True, eq=False)
class Deepstack:
    """features: one [V, D] tensor per layer, in prompt order. place: [B, L] row of them, -1 where there is none."""

    features: tuple[Tensor, ...]
    place: Tensor

    @classmethod
    def pop(cls, kwargs: dict[str, Any]) -> Deepstack | None:
        """Take the language model's keyword arguments over; None for models or calls without them."""
        mask, features = kwargs.pop("visual_pos_masks", None), kwargs.pop("deepstack_visual_embeds", None)
        if mask is None or features is None:
            return None
        number = mask.flatten().long().cumsum(0).view(mask.shape) - 1
        return cls(tuple(features), torch.where(mask, number, -1))

    def take(self, index: Tensor) -> Deepstack:
        """Follow a gather of rows, index [B, L']."""
        return replace(self, place=take_last(self.place, index))

    def to(self, device: torch.device) -> Deepstack:
        """The same rows on another device."""
        return Deepstack(tuple(feature.to(device) for feature in self.features), self.place.to(device))

    def add(self, layer: int, hidden: Tensor, valid: Tensor | None) -> Tensor:
        """[B, L, D] input of LLM layer `layer`, with the rows that belong behind the layer before it."""
        if not 0 < layer <= len(self.features):
            return hidden
        feature = self.features[layer - 1].to(hidden.device, hidden.dtype)
        present = self.place >= 0 if valid is None else (self.place >= 0) & valid
        return hidden + torch.where(present[..., None], feature[self.place.clamp(min=0)], 0)
