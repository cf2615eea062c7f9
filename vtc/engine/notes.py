"""What is noted of hooks: how long they took, and of an exception its type and message, without frames and tensors."""

from __future__ import annotations

import copy
import functools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from vtc.engine.passes import Passes

LIMIT = 100
"""Exceptions kept; older ones go."""


def without_frames(error: Exception) -> Exception:
    """The same exception without traceback, cause and context; a plain Exception where it holds more than text."""
    if all(isinstance(part, str | int | float | bool | None) for part in (*error.args, *vars(error).values())):
        try:
            return copy.copy(error)
        except Exception:  # a constructor that takes something else than `args`
            pass
    return Exception(f"{type(error).__name__}: {error}")


def bounded() -> deque[Exception]:
    """An empty list of the last exceptions."""
    return deque(maxlen=LIMIT)


class Noting(Protocol):
    """What has hooks."""

    errors: deque[Exception]
    passes: Passes[Any]


def guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Count the hook's host time and remember what it raised, for callers that swallow exceptions."""

    @functools.wraps(hook)
    def timed(self: Noting, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:
            self.errors.append(without_frames(error))
            raise
        finally:
            if (one := self.passes.current) is not None:
                one.seconds += time.perf_counter() - start

    return timed
