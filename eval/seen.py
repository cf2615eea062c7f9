"""Which answers a store holds, and where in its file: about nine bytes for each, so that there may be millions."""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from typing import cast

RowKey = tuple[str, str, str, int, int]
"""Cell, task, task fingerprint, document and repeat."""
SPAN = 1024
"""Documents whose bits are one number."""


@dataclass
class _Group:
    """The answers of one cell to one version of a task: bits by repeat and span, and places in the file."""

    bits: dict[tuple[int, int], int] = field(default_factory=dict)
    places: array[int] = field(default_factory=lambda: array("q"))


class Seen:
    """A set of row keys that remembers where each row begins."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], dict[str, _Group]] = defaultdict(dict)
        self._count = 0

    def __contains__(self, key: object) -> bool:
        cell, task, fingerprint, doc_id, repeat = cast(RowKey, key)
        group = self._groups.get((task, fingerprint), {}).get(cell)
        return group is not None and bool(group.bits.get((repeat, doc_id // SPAN), 0) >> doc_id % SPAN & 1)

    def __len__(self) -> int:
        return self._count

    def add(self, key: RowKey, place: int) -> None:
        """Note that the row of `key` begins at byte `place`; the first row of a key is the one that counts."""
        if key in self:
            return
        cell, task, fingerprint, doc_id, repeat = key
        group = self._groups[task, fingerprint].setdefault(cell, _Group())
        span = repeat, doc_id // SPAN
        group.bits[span] = group.bits.get(span, 0) | 1 << doc_id % SPAN
        group.places.append(place)
        self._count += 1

    def has_document(self, task: tuple[str, str], doc_id: int) -> bool:
        """Whether any cell has answered a document of `task`, a name with a fingerprint."""
        span, bit = doc_id // SPAN, doc_id % SPAN
        groups = self._groups.get(task, {}).values()
        return any(bits >> bit & 1 for group in groups for (_, at), bits in group.bits.items() if at == span)

    def count(self, cell: str, task: tuple[str, str], below: int) -> int:
        """How many answers of `cell` to the first `below` documents of `task` there are, all repeats together."""
        group = self._groups.get(task, {}).get(cell, _Group())
        wanted = {at: (1 << min(SPAN, max(0, below - at * SPAN))) - 1 for _, at in group.bits}
        return sum((bits & wanted[at]).bit_count() for (_, at), bits in group.bits.items() if at >= 0)

    def places(self, cell: str, task: tuple[str, str]) -> array[int]:
        """Where the rows of `cell` on `task` begin, in the order of the file."""
        return self._groups.get(task, {}).get(cell, _Group()).places
