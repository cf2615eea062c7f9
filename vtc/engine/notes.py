"""What is kept of an exception: its type and message, without the frames and tensors that its traceback holds."""

from __future__ import annotations

import copy
from collections import deque

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
