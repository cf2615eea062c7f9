"""What a method may record of a layer: rows of its attention matrix, its keys, its output, or what its blocks do.

A reading is a small frozen dataclass that turns the queries and keys of one attention call into the few numbers a
method needs, so that no layer ever returns its attention matrix. The ready ones are in `Rows`; a method with needs of
its own subclasses `VisionReading`, `LLMReading` or `BlockReading` in its own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.ops.attention import Heads, attention_logits, attention_received, attention_rows, attention_sums
from vtc.ops.select import front_pack, left_pack


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


@dataclass(frozen=True, eq=False)
class QueryRows:
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
class LastRow(LLMReading):
    """Softmax attention of the last token of each row's prompt, mean over heads: [B, K]."""

    name: ClassVar[str] = "last"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        query, key = attention.query, attention.key
        return attention_rows(query, key, rows.last, attention.scaling, mask=rows.mask, causal=True)[:, 0]


@dataclass(frozen=True)
class LastRowAhead(LastRow):
    """As `LastRow`, of the layer behind the stage."""

    name: ClassVar[str] = "last, own projections"
    ahead: ClassVar[bool] = True


def _heads(per_head: bool) -> Heads:
    return "groups" if per_head else "mean"


@dataclass(frozen=True)
class LastRows(LLMReading):
    """Softmax attention of the last `window` rows of each row's prompt, mean over them and over heads: [B, K].

    Of a shorter prompt, all its rows. per_head: the mean over the query heads of each KV head instead: [H, B, K].
    """

    window: int = 32
    per_head: bool = False

    name: ClassVar[str] = "last rows"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * min(self.window, length) * length * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        query, key, heads = attention.query, attention.key, _heads(self.per_head)
        index = left_pack(rows.prompt, min(self.window, rows.prompt.shape[1]))
        real = rows.prompt.gather(1, index)[..., None]
        found = attention_rows(query, key, index, attention.scaling, mask=rows.mask, causal=True, heads=heads)
        found = found.transpose(0, 1) if self.per_head else found
        return torch.where(real, found, 0).sum(-2) / real.sum(1).clamp(min=1)


@dataclass(frozen=True)
class PromptSum(LLMReading):
    """Softmax attention, mean over heads, summed over all rows of the prompt: [B, K].

    per_head: the mean over the query heads of each KV head instead: [H, B, K].
    """

    per_head: bool = False

    name: ClassVar[str] = "prompt rows"

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length**2 * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        weights, heads = rows.prompt[None].float(), _heads(self.per_head)
        query, key = attention.query, attention.key
        found = attention_sums(query, key, weights, attention.scaling, mask=rows.mask, causal=True, heads=heads)[0]
        return found.transpose(0, 1) if self.per_head else found


@dataclass(frozen=True)
class GroupSums(LLMReading):
    """Softmax attention, mean over heads, summed over the text rows and over the visual rows: [2, B, K]."""

    name: ClassVar[str] = "text and visual rows"
    differentiable: ClassVar[bool] = True

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * length**2 * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        groups = torch.stack([rows.text, rows.visual])
        query, key = attention.query, attention.key
        return attention_sums(query, key, groups.float(), attention.scaling, mask=rows.mask, causal=True)


@dataclass(frozen=True)
class QuestionAhead(LLMReading):
    """Softmax attention of the text behind each row's first visual token, mean over it and over heads: [B, K].

    Of the layer behind the stage. Zero where no text stands there.
    """

    name: ClassVar[str] = "question, own projections"
    ahead: ClassVar[bool] = True

    def operations(self, length: float, width: int, text: float = 0) -> float:
        return 2 * text * length * width

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        asking = rows.text & (rows.visual.cumsum(1) > 0)
        index, number = front_pack(asking, rows.text_count), asking.sum(1, keepdim=True)
        real = torch.arange(index.shape[1], device=index.device) < number
        found = attention_rows(attention.query, attention.key, index, attention.scaling, mask=rows.mask, causal=True)
        return torch.where(real[..., None], found, 0).sum(1) / number.clamp(min=1)


@dataclass(frozen=True)
class Transition(BlockReading):
    """How far a block stretches and turns each row: ``(|b_i| / |a_i|) softmax_i(1 - cos(a_i, b_i))``, [2, B, L].

    The block makes b of a. The softmax is over all rows of the prompt, text included; of other rows it is 0.
    """

    name: ClassVar[str] = "transitions"

    def changed(self, before: Tensor, after: Tensor, rows: QueryRows) -> Tensor:
        before, after = before.float(), after.float()
        given, made = before.norm(dim=2), after.norm(dim=2)
        cosine = (before * after).sum(2) / (given * made).clamp(min=1e-12)
        turned = (1 - cosine).masked_fill(~rows.prompt, torch.finfo(torch.float32).min).softmax(1)
        return torch.where(rows.prompt, made / given.clamp(min=1e-12) * turned, 0)


@dataclass(frozen=True)
class Pixels(VisionReading):
    """What the encoder was given of each patch: [crops, T, channels * height * width], zero for the class token."""

    name: ClassVar[str] = "pixels"

    def read(self, attention: AttentionCall) -> Tensor:
        raise NotImplementedError("recorded from the encoder's input, not from its attention")

    def join(self, members: Tensor) -> Tensor:
        """The pixels of all patches of a token, side by side."""
        return members.flatten(2)


class Rows:
    """The ready readings.

    >>> import vtc
    >>> vtc.Needs(vision={22: Rows.CLS}, llm={1: (Rows.LAST, Rows.GROUP_SUMS)}).vision_pairs
    ((22, ClassRow()),)
    """

    PIXELS = Pixels()

    CLS = ClassRow()
    CLS_PATCHES = ClassToPatches()
    CLS_LOGITS = ClassLogits()
    RECEIVED = Received()
    KEYS = Keys()
    HIDDEN = LayerOutput()
    LAST = LastRow()
    LAST_AHEAD = LastRowAhead()
    SUM = PromptSum()
    GROUP_SUMS = GroupSums()
    QUESTION_AHEAD = QuestionAhead()
    TRANSITION = Transition()
