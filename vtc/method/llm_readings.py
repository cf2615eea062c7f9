"""The ready readings of LLM layers: rows of the prompt, and what the blocks of a layer make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc.method.readings import AttentionCall, BlockReading, LLMReading, QueryRows
from vtc.ops.attention import Heads, attention_rows, attention_sums
from vtc.ops.select import front_pack, left_pack


def _heads(per_head: bool) -> Heads:
    return "groups" if per_head else "mean"


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

    def asking(self, rows: QueryRows) -> Tensor:
        """[B, L] bool, the rows that count."""
        return rows.prompt

    def read(self, attention: AttentionCall, rows: QueryRows) -> Tensor:
        weights, heads = self.asking(rows)[None].float(), _heads(self.per_head)
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
        asking = rows.asking
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
