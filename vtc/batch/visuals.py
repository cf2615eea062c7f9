"""What a chunk of the prompt brings to look at: its items, where the question lies, and the counts the host needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vtc.batch.context import VisionContext
from vtc.batch.items import ItemTable, build
from vtc.batch.prompt import Prompt
from vtc.errors import UnsupportedCall
from vtc.method.layout import Kind


class HostCounts(NamedTuple):
    """Placeholders per kind and row, valid tokens per row, longest text, most visual tokens outside a row's prompt."""

    kinds: list[int]
    rows: list[int]
    text: int
    outside: int


@dataclass(frozen=True, eq=False)
class Visuals:
    """What a chunk with visual tokens brings: items and their separators, [B, L] bool marks, host counts.

    visual: tokens and separators. prompt, text: see `vtc.batch.prompt`; no row has more text than `text_count`.
    row_counts: valid tokens of each row.
    """

    items: ItemTable
    separators: ItemTable
    visual: Tensor
    prompt: Tensor
    text: Tensor
    text_count: int
    row_counts: Sequence[int]

    @classmethod
    def find(
        cls,
        placeholders: Tensor,
        contexts: Sequence[VisionContext],
        kinds: Sequence[Kind],
        counts: HostCounts,
        prompt: Prompt,
    ) -> Visuals:
        """Match `contexts` to the `placeholders` [K, B, S] of `kinds`. Raises UnsupportedCall where they do not fit."""
        if counts.outside:
            raise UnsupportedCall(
                f"{counts.outside} visual tokens of a row lie outside the prompt; set the labels of visual tokens to "
                "-100, and let prompt_length cover every image"
            )
        items, separators = build(placeholders, counts.kinds, contexts, {kind: at for at, kind in enumerate(kinds)})
        return cls(items, separators, placeholders.any(0), prompt.rows, prompt.text, counts.text, counts.rows)


def host_counts(placeholders: Tensor, prompt: Prompt) -> HostCounts:
    """What the host needs to know of a chunk [B, S], in one transfer. placeholders: [K, B, S]."""
    batch = placeholders.shape[1]
    outside = placeholders.any(0) & prompt.valid & ~prompt.rows
    parts = [placeholders.sum(-1).flatten(), prompt.valid.sum(1), prompt.text.sum(1), outside.sum(1)]
    numbers: list[int] = torch.cat(parts).tolist()
    per_kind, rows = numbers[: -3 * batch], numbers[-3 * batch : -2 * batch]
    return HostCounts(per_kind, rows, max(numbers[-2 * batch : -batch]), max(numbers[-batch:]))
