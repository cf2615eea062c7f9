"""The ready readings of vision encoders: what the class token attends to, what patches receive, keys and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.method.readings import AttentionCall, VisionReading
from vtc.ops.attention import attention_logits, attention_received, attention_rows, attention_sums


def _class_rows(attention: AttentionCall) -> Tensor:
    """[crops, 1] places of the class token."""
    return torch.zeros(attention.query.shape[0], 1, dtype=torch.long, device=attention.query.device)


@dataclass(frozen=True)
class ClassRow(VisionReading):
    """Softmax attention of the class token to every key, mean over heads; the row sums to one."""

    name: ClassVar[str] = "cls"
    needs_cls: ClassVar[bool] = True

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length * width

    def read(self, attention: AttentionCall) -> Tensor:
        rows = _class_rows(attention)
        return attention_rows(attention.query, attention.key, rows, attention.scaling, mask=attention.mask)[:, 0]


@dataclass(frozen=True)
class ClassToPatches(VisionReading):
    """As `ClassRow` with the softmax over the patches alone, without the class token's own key (which reads 0)."""

    name: ClassVar[str] = "cls to patches"
    needs_cls: ClassVar[bool] = True

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length * width

    def read(self, attention: AttentionCall) -> Tensor:
        logits = attention_logits(
            attention.query, attention.key, _class_rows(attention), attention.scaling, mask=attention.mask
        )
        weights = logits[:, :, 0, 1:].softmax(-1).mean(1)
        return torch.nn.functional.pad(weights, (1, 0))


@dataclass(frozen=True)
class ClassLogits(VisionReading):
    """Scaled products of the class token's query with every key before the softmax, mean over heads."""

    name: ClassVar[str] = "cls logits"
    needs_cls: ClassVar[bool] = True

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length * width

    def read(self, attention: AttentionCall) -> Tensor:
        rows = _class_rows(attention)
        return attention_logits(attention.query, attention.key, rows, attention.scaling).mean(1)[:, 0]


@dataclass(frozen=True)
class Received(VisionReading):
    """Softmax attention every key receives, mean over heads and over all queries, the class token's included."""

    name: ClassVar[str] = "received"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length**2 * width

    def read(self, attention: AttentionCall) -> Tensor:
        query, key, scaling, mask = attention.query, attention.key, attention.scaling, attention.mask
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == 1:  # padding, or sizes
            real = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)[:, 0, 0]
            share = real / real.sum(1, keepdim=True)
            return attention_sums(query, key, share[None], scaling, mask=mask)[0]
        return attention_received(query, key, scaling, mask=mask, segments=attention.segments)


@dataclass(frozen=True)
class Keys(VisionReading):
    """The key vectors, heads concatenated (after rotary embedding where the encoder has one)."""

    name: ClassVar[str] = "keys"

    def read(self, attention: AttentionCall) -> Tensor:
        return attention.key.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class MeanKeys(VisionReading):
    """The key vectors, mean over heads: [crops, T, head width]. rounded: in the model's precision, else in float32."""

    rounded: bool = False

    name: ClassVar[str] = "mean keys"

    def read(self, attention: AttentionCall) -> Tensor:
        return (attention.key if self.rounded else attention.key.float()).mean(1)


@dataclass(frozen=True)
class LayerOutput(VisionReading):
    """The hidden states that leave the encoder layer."""

    name: ClassVar[str] = "hidden states"

    def read(self, attention: AttentionCall) -> Tensor:
        raise NotImplementedError("recorded from the layer's output, not from its attention")


@dataclass(frozen=True)
class Pixels(VisionReading):
    """What the encoder was given of each patch: [crops, T, channels * height * width], zero for the class token."""

    name: ClassVar[str] = "pixels"

    def read(self, attention: AttentionCall) -> Tensor:
        raise NotImplementedError("recorded from the encoder's input, not from its attention")

    def join(self, members: Tensor) -> Tensor:
        """The pixels of all patches of a token, side by side."""
        return members.flatten(2)
