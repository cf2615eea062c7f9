"""Forward passes that have begun and not ended, so that none of them leaves a cache behind that looks complete.

A pass can end in three ways: it returns, it raises and the hook behind it sees that, or nobody sees it, because Ctrl-C
skips hooks and a detached engine has none. Then its cache refuses to go on.
"""

from __future__ import annotations

from vtc.engine.call import Call


class OpenCalls:
    """The calls in progress, over all threads."""

    def __init__(self) -> None:
        self._calls: set[Call] = set()

    def begin(self, call: Call) -> None:
        """Open the call's cache for writing."""
        if call.cache is not None:
            call.cache.begin()
        self._calls.add(call)

    def end(self, call: Call) -> None:
        """The call has returned."""
        self._calls.discard(call)
        if call.cache is not None:
            call.cache.end()

    def fail(self, call: Call) -> None:
        """The call has raised: its cache becomes what it was before, a plain one if it was that."""
        self._calls.discard(call)
        if call.cache is not None:
            call.cache.restore(plain=call.adopted)

    def interrupt(self, call: Call) -> None:
        """The call was left without a sign."""
        self._calls.discard(call)
        if call.cache is not None:
            call.cache.interrupt()

    def interrupt_all(self) -> None:
        """Nothing will see these calls end."""
        for call in tuple(self._calls):
            self.interrupt(call)
