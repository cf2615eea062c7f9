"""Forward passes in progress: every thread and every task finds its own, and none outlives its owner."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from vtc.batch.rows import Batch


@dataclass(eq=False)
class Pass:
    """What one forward pass knows. batch: what is left of it, None before it is known. memory: the method's own."""

    batch: Batch | None = None
    memory: dict[Any, Any] = field(default_factory=dict)
    around: weakref.ref[Pass] | None = None

    @property
    def now(self) -> Batch:
        """The batch, once it is known."""
        assert self.batch is not None
        return self.batch


P = TypeVar("P", bound=Pass)
_innermost: ContextVar[weakref.ref[Pass] | None] = ContextVar("vtc_innermost_pass", default=None)


class Passes(Generic[P]):
    """The passes of one owner, over all threads; the owner alone keeps them alive."""

    def __init__(self) -> None:
        self._open: set[P] = set()

    def __iter__(self) -> Iterator[P]:
        return iter(tuple(self._open))

    @property
    def current(self) -> P | None:
        """The one that the caller is inside of."""
        found = _innermost.get()
        while found is not None and (one := found()) is not None:
            if one in self._open:
                return one
            found = one.around
        return None

    def begin(self, one: P) -> P:
        """Enter `one`."""
        self._open.add(one)
        one.around = _innermost.get()
        _innermost.set(weakref.ref(one))
        return one

    def end(self, one: P) -> None:
        """Leave `one`, and with it whatever was left open inside."""
        if one is self.current:
            _innermost.set(one.around)
        self._open.discard(one)
