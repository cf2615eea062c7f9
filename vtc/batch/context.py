"""What one call of the vision encoder hands over: its items and everything known about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtc.method.layout import Kind, VisualItem
from vtc.method.readings import VisionReading


@dataclass
class VisionContext:
    """Everything one call of get_image_features or get_video_features tells about its items.

    fingerprint: [I] int64, a key of each item's pixels (the same image gives the same key in any batch).
    to_tokens: pushes a per-patch quantity [crops, T, C] (T as the encoder emits it, class token included) through the
    model's own packing, one [n_i, C] tensor per item, NaN on newline tokens.
    attention: (encoder layer, reading) -> [I, Nmax] or [I, Nmax, C] per token, as the method's Needs asked for it.
    alive: [I, Nmax] bool where an encoder stage removed tokens, with the surviving counts; None where none did.
    unpooled: [I, P, D] what the projector made of all patches, crop by crop, where the model pools these to tokens and
    the method's Needs asked for it.
    rows: (encoder layer, rows of each crop from there on, in the mean over crops and padding included) of those stages.
    """

    kind: Kind
    items: list[VisualItem]
    fingerprint: Tensor
    to_tokens: Callable[[Tensor], list[Tensor]]
    attention: dict[tuple[int, VisionReading], Tensor] = field(default_factory=dict)
    alive: tuple[Tensor, tuple[int, ...]] | None = None
    unpooled: Tensor | None = None
    rows: tuple[tuple[int, float], ...] = ()

    @property
    def total(self) -> int:
        """Tokens of all items together."""
        return sum(item.n_tokens for item in self.items)

    def pack(self, values: Tensor) -> Tensor:
        """[crops, T, ...] per-patch values -> [I, Nmax, ...] per token, zero on newlines and behind an item's end."""
        tokens = self.to_tokens(values.flatten(2) if values.ndim > 2 else values[..., None])
        packed = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        packed = packed.masked_fill(packed.isnan(), 0)
        return packed.view(*packed.shape[:2], *values.shape[2:]) if values.ndim > 2 else packed[..., 0]
