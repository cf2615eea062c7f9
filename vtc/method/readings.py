"""What a method may record of a layer: rows of its attention matrix, its keys, its output, or what its blocks do.

A reading is a small frozen dataclass that turns the queries and keys of one attention call into the few numbers a
method needs, so that no layer ever returns its attention matrix. The ready ones are in `vtc.Rows`; a method with needs
of its own subclasses `VisionReading`, `LLMReading` or `BlockReading` in its own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


def exact(device: torch.device) -> torch.autocast:
    """Inside this context products of float32 tensors stay float32, whatever autocast the caller runs under."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one attention call: query [B, Hq, Q, D], key [B, Hk, K, D] after rotary embedding, and its mask.

    segments: [S + 1] ends of the sequences packed along Q, starting with 0, where one call serves several of them.
    """

    query: Tensor
    key: Tensor
    mask: Any
    scaling: float
    causal: bool
    segments: Tensor | None = None


class PromptRows:
    """What follows from which rows of a prompt are visual and which are text, [B, L] bool."""

    visual: Tensor
    text: Tensor

    @property
    def asking(self) -> Tensor:
        """[B, L] bool, the text behind each row's first visual token; text in front of every image sees none."""
        return self.text & (self.visual.cumsum(1) > 0)


@dataclass(frozen=True, eq=False)
class QueryRows(PromptRows):
    """The rows of the current chunk that an LLM reading may ask about.

    prompt, visual, text: [B, L] bool; the prompt is without padding and without whatever is an answer, separators count
    as visual, text is what else the prompt holds but for its system prompt. text_count: no row has more text than this
    (known on the host). last: [B, 1] place of the prompt's last row. mask: as `attention_rows` takes it.
    """

    prompt: Tensor
    visual: Tensor
    text: Tensor
    text_count: int
    last: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Reading(ABC):
    """What to record of a layer. name: for tables and messages. differentiable: recorded with its autograd graph."""

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False

    def operations(self, length: float, width: int, text: float = 0) -> float:
        """What it costs in matrix products, two operations per multiply-accumulate, for one sequence of `length` rows.

        width: of the queries of all heads together. text: rows of the LLM that are text. Zero unless a reading
        multiplies.
        """
        return 0.0


@dataclass(frozen=True)
class VisionReading(Reading):
    """Something recorded of a vision encoder's attention. needs_cls: only encoders with a class token have it.

    >>> class Sharpness(VisionReading):
    ...     name = "sharpness"
    ...     def read(self, attention):  # query, key: [crops, heads, T, width]
    ...         return attention.key.float().norm(dim=-1).mean(1)
    >>> Sharpness().name
    'sharpness'
    """

    needs_cls: ClassVar[bool] = False

    @abstractmethod
    def read(self, attention: AttentionCall) -> Tensor:
        """[crops, T] or [crops, T, C] for the T rows of the encoder, the class token included.

        More axes behind T are for stages inside the encoder alone.
        """

    def join(self, members: Tensor) -> Tensor:
        """What was read of the patches of each token, [crops, N, patches, ...], as one value: their mean."""
        return members[:, :, 0] if members.shape[2] == 1 else members.float().mean(2).to(members.dtype)


@dataclass(frozen=True)
class LLMReading(Reading):
    """Something recorded of an LLM layer's attention while the prompt passes through it.

    ahead: read before the layer runs, at the stage in front of it, from the layer's own projections of the rows that
    arrive there; only where a method asks for it, since the projections are computed a second time.

    >>> class KeyNorm(LLMReading):
    ...     name = "key norm"
    ...     def read(self, attention, rows):  # rows: which are prompt, visual or text
    ...         return attention.key.float().norm(dim=-1).mean(1)
    >>> KeyNorm().ahead
    False
    """

    ahead: ClassVar[bool] = False

    @abstractmethod
    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        """[..., B, K] over the keys; the engine cuts out those of the current chunk."""


@dataclass(frozen=True)
class BlockReading(LLMReading):
    """Something recorded of what the two blocks of an LLM layer, its attention and its MLP, make of the rows.

    What is noted of a layer is [2, ..., B, L], the attention's first.

    >>> class Length(BlockReading):
    ...     name = "length of what a block adds"
    ...     def changed(self, before, after, rows):
    ...         return after.float().norm(dim=2)
    >>> Length().operations(576, 4096)
    0.0
    """

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        raise NotImplementedError("recorded of the layer's blocks, not of its attention")

    @abstractmethod
    def changed(self, before: Tensor, after: Tensor, rows: QueryRows) -> Tensor:
        """[..., B, L] of a block that is given the normed rows `before` and answers `after`, both [B, L, D].

        The answer is what is added to the rows; the norm and the addition are no part of the block.
        """
