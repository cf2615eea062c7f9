"""Visual rows that some models add to the hidden states of the first LLM layers (Qwen3-VL).

The model indexes them by a mask over the whole prompt, which no longer fits once tokens are gone. The engine therefore
takes them over and adds the surviving rows itself, in front of the next layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.batch.rows import RowTable

PLACE = "deepstack"
"""Key in `RowTable.extra` of each row's place in the features, -1 where it has none."""


def take_over(kwargs: dict[str, Any], rows: RowTable) -> tuple[tuple[Tensor, ...], RowTable]:
    """One [V, D] tensor per layer, in prompt order, out of the language model's arguments, and the rows' places in it.

    No tensors for models or calls without them.
    """
    mask, features = kwargs.pop("visual_pos_masks", None), kwargs.pop("deepstack_visual_embeds", None)
    if mask is None or features is None:
        return (), rows
    number = mask.flatten().long().cumsum(0).view(mask.shape) - 1
    return tuple(features), rows.note(PLACE, torch.where(mask, number, -1))


def add_features(features: tuple[Tensor, ...], layer: int, hidden: Tensor, rows: RowTable) -> Tensor:
    """[B, L, D] input of LLM layer `layer`, with the rows that belong behind the layer before it."""
    if not 0 < layer <= len(features):
        return hidden
    feature, place = features[layer - 1].to(hidden.device, hidden.dtype), rows.extra[PLACE].to(hidden.device)
    present = place >= 0 if rows.valid is None else (place >= 0) & rows.valid.to(hidden.device)
    return hidden + torch.where(present[..., None], feature[place.clamp(min=0)], 0)
