"""Which answers are missing, as items: fixed blocks of documents with the cells that lack answers to them.

Blocks depend on the batch size only, never on what is missing, so a resumed sweep sees the batches of an uninterrupted
one. Only documents that failed alone leave their block: the others of it are answered without them, and later runs try
each of them once more, alone.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vtc.eval.asked import Asked
from vtc.eval.seen import RowKey


@dataclass(frozen=True)
class Item:
    """A block of documents of one task, and the keys of the cells that still lack some of its answers."""

    task: str
    doc_ids: tuple[int, ...]
    cells: tuple[str, ...]


def plan(
    task: Asked,
    documents: int,
    cells: Sequence[str],
    seen: Container[RowKey],
    batch_size: int,
    apart: Collection[int] = (),
) -> Iterator[Item]:
    """The items that complete `cells` on the first `documents` of `task`, given the rows already `seen`.

    apart: documents that failed alone before; each is an item of its own, behind the others.
    """
    blocks = [range(start, min(documents, start + batch_size)) for start in range(0, documents, batch_size)]
    whole = [tuple(doc_id for doc_id in block if doc_id not in apart) for block in blocks]
    alone = [(doc_id,) for doc_id in sorted(apart) if doc_id < documents]
    for doc_ids in [*whole, *alone]:
        pending = [cell for cell in cells if any(key not in seen for key in _keys(task, cell, doc_ids))]
        if pending:
            yield Item(task.name, doc_ids, tuple(pending))


def missing(task: Asked, cell: str, doc_ids: Iterable[int], seen: Container[RowKey]) -> int:
    """How many answers of `cell` to these documents are not in `seen`."""
    return sum(key not in seen for key in _keys(task, cell, doc_ids))


def _keys(task: Asked, cell: str, doc_ids: Iterable[int]) -> Iterator[RowKey]:
    for doc_id in doc_ids:
        for repeat in range(task.repeats):
            yield cell, task.name, task.fingerprint, doc_id, repeat
