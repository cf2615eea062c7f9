"""Matching what the encoder made to the placeholders of a prompt: where the items of a batch lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vtc.batch.context import VisionContext
from vtc.batch.prompt import Prompt
from vtc.batch.rows import Batch
from vtc.errors import UnsupportedCall
from vtc.method.items import ItemTable
from vtc.method.layout import Kind, VisualItem
from vtc.ops.host import put


class HostCounts(NamedTuple):
    """Placeholders per kind and row, valid tokens per row, longest text, most visual tokens outside a row's prompt."""

    kinds: list[int]
    rows: list[int]
    text: int
    outside: int


def host_counts(placeholders: Tensor, prompt: Prompt) -> HostCounts:
    """What the host needs to know of a chunk [B, S], in one transfer. placeholders: [K, B, S]."""
    batch = placeholders.shape[1]
    outside = placeholders.any(0) & prompt.valid & ~prompt.rows
    parts = [placeholders.sum(-1).flatten(), prompt.valid.sum(1), prompt.text.sum(1), outside.sum(1)]
    numbers: list[int] = torch.cat(parts).tolist()
    per_kind, rows = numbers[: -3 * batch], numbers[-3 * batch : -2 * batch]
    return HostCounts(per_kind, rows, max(numbers[-2 * batch : -batch]), max(numbers[-batch:]))


def find_items(
    batch: Batch,
    placeholders: Tensor,
    contexts: Sequence[VisionContext],
    kinds: Sequence[Kind],
    counts: HostCounts,
    prompt: Prompt,
) -> Batch:
    """The batch with the items of `contexts` at the `placeholders` [K, B, S] of `kinds`, and where its prompt lies.

    Raises UnsupportedCall where they do not fit.
    """
    if counts.outside:
        raise UnsupportedCall(
            f"{counts.outside} visual tokens of a row lie outside the prompt; set the labels of visual tokens to "
            "-100, and let prompt_length cover every image"
        )
    items, separators = build(placeholders, counts.kinds, contexts, {kind: at for at, kind in enumerate(kinds)})
    valid = None if all(total == batch.length for total in counts.rows) else batch.rows.valid
    rows = replace(batch.rows, visual=placeholders.any(0), prompt=prompt.rows, text=prompt.text, valid=valid)
    return replace(
        batch, rows=rows, items=items, separators=separators, totals=tuple(counts.rows), text_count=counts.text
    )


@dataclass(frozen=True, eq=False)
class _Entry:
    """One item at its place: batch row, kind number, first placeholder of that kind in the row, encoder entry."""

    row: int
    kind: int
    offset: int
    source: int
    layout: VisualItem


def build(
    placeholders: Tensor, counts: Sequence[int], contexts: Sequence[VisionContext], kinds: dict[Kind, int]
) -> tuple[ItemTable, ItemTable]:
    """Assign the encoded items of all `contexts` to the placeholders of a batch: their tokens, and their separators.

    placeholders: [K, B, S] bool, one mask per kind in the order of `kinds`. counts: their [K * B] sums on the host.
    Items fill the rows in order; under beams or num_return_sequences each item serves several neighbouring rows.
    Raises UnsupportedCall when placeholders and encoded tokens do not line up.
    """
    batch = placeholders.shape[1]
    entries: list[_Entry] = []
    source = 0
    for context in contexts:
        kind = kinds[context.kind]
        per_row = list(counts[kind * batch : (kind + 1) * batch])
        entries += _assign(context, kind, per_row, source)
        source += len(context.items)
    for name, kind in kinds.items():
        if sum(counts[kind * batch : (kind + 1) * batch]) and not any(c.kind == name for c in contexts):
            raise UnsupportedCall(
                f"the prompt holds {name} placeholders but no {name} was encoded; pass its pixels too"
            )
    entries.sort(key=lambda entry: (entry.row, entry.kind, entry.offset))
    device = placeholders.device
    sizes = tuple(entry.layout.n_tokens for entry in entries)
    numbers = [(e.kind, e.row, e.offset, e.layout.n_tokens, e.source) for e in entries]
    kind_of, row, offset, size, source_of = put(numbers, device).unbind(1)
    steps = torch.arange(max(sizes), device=device)
    mask = steps < size[:, None]
    order = (~placeholders).to(torch.uint8).argsort(dim=2, stable=True)  # placeholder positions first, in order
    rank = torch.where(mask, offset[:, None] + steps, 0)
    index = order[kind_of[:, None], row[:, None], rank]
    fixed = tuple(entry.layout.newlines for entry in entries)
    table = ItemTable(
        row=row,
        index=torch.where(mask, index, 0),
        token=torch.where(mask, steps, 0),
        mask=mask,
        source=source_of,
        positions=torch.where(mask, index, 0),
        rows=tuple(entry.row for entry in entries),
        sources=tuple(entry.source for entry in entries),
        counts=(real := tuple(size - newlines for size, newlines in zip(sizes, fixed, strict=True))),
        fixed=fixed,
        input_counts=sizes,
        entered=real,
        layouts=tuple(entry.layout for entry in entries),
    )
    return table.split()


def _assign(context: VisionContext, kind: int, per_row: list[int], source: int) -> list[_Entry]:
    placeholders, total = sum(per_row), context.total
    if total == 0 or placeholders % total:
        raise UnsupportedCall(
            f"{placeholders} {context.kind} placeholders cannot be matched to {total} encoded tokens; compression "
            "needs the whole prompt with all its pixels in one call (chunked prefill is not supported)"
        )
    expand = placeholders // total
    entries: list[_Entry] = []
    item = 0
    for first in range(0, len(per_row), expand):
        group = per_row[first : first + expand]
        if len(set(group)) != 1:
            raise UnsupportedCall(
                f"rows {first} to {first + expand - 1} share encoded items but hold {group} placeholders; repeat every "
                "prompt unchanged, or pass the pixels of each row"
            )
        offset = 0
        while offset < group[0]:
            layout = context.items[item]
            if offset + layout.n_tokens > group[0]:
                raise UnsupportedCall(
                    f"row {first} holds {group[0]} {context.kind} placeholders, which ends inside an item of "
                    f"{layout.n_tokens} tokens; prompts and pixels must come in the same order"
                )
            entries += [_Entry(row, kind, offset, source + item, layout) for row in range(first, first + len(group))]
            offset += layout.n_tokens
            item += 1
    return entries
