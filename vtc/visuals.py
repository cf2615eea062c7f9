"""What a chunk of the prompt brings to look at: its items, where the question lies, and the counts the host needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtc.items import ItemTable, build
from vtc.layout import Kind, VisionContext


@dataclass(frozen=True, eq=False)
class Visuals:
    """What a chunk with visual tokens brings: items and their separators, [B, L] bool marks, host counts.

    visual: tokens and separators. text: the question behind a row's first visual token, of at most `text_count`
    tokens. row_counts: valid tokens of each row.
    """

    items: ItemTable
    separators: ItemTable
    visual: Tensor
    text: Tensor
    text_count: int
    row_counts: Sequence[int]

    @classmethod
    def find(
        cls,
        placeholders: Tensor,
        contexts: Sequence[VisionContext],
        kinds: Sequence[Kind],
        counts: tuple[list[int], list[int], int],
        text: Tensor,
    ) -> Visuals:
        """Match `contexts` to the `placeholders` [K, B, S] of `kinds`; counts: as `host_counts` returns them."""
        per_kind, row_counts, longest = counts
        items, separators = build(placeholders, per_kind, contexts, {kind: at for at, kind in enumerate(kinds)})
        return cls(items, separators, placeholders.any(0), text, longest, row_counts)


def question_rows(placeholders: Tensor, mask: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, S] bool valid rows, and those of the question: behind a row's first visual token, neither visual nor answer.

    labels: -100 marks what is no answer; None for calls without an answer.
    """
    visual = placeholders.any(0)
    length = visual.shape[1]
    valid = torch.ones_like(visual) if mask is None else mask[:, -length:].to(visual.device).bool()
    text = valid & ~visual & (visual.cumsum(1) > 0)
    return valid, text if labels is None else text & (labels.to(visual.device) == -100)


def host_counts(placeholders: Tensor, valid: Tensor, text: Tensor) -> tuple[list[int], list[int], int]:
    """Placeholders per kind and row, valid tokens per row and the longest question, in one transfer to the host."""
    batch = len(valid)
    parts = [placeholders.sum(-1).flatten(), valid.sum(1), text.sum(1)]
    numbers: list[int] = torch.cat(parts).tolist()
    return numbers[: -2 * batch], numbers[-2 * batch : -batch], max(numbers[-batch:])
