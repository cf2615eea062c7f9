"""What the engine keeps for one thread: the forward pass it is in, and the loss of the last one."""

from __future__ import annotations

import threading

from torch import Tensor

from vtc.batch.context import VisionContext
from vtc.engine.call import Call


class ThreadState(threading.local):
    """What one thread's current forward pass knows.

    placeholders: [K, B, S], control: [B, S] bool, ids: [B, S], all of the call's input. contexts: of its media. call:
    in progress, untouched: one whose budget keeps everything. seconds: host time so far. media: pixels went into the
    model and have not reached the language model yet. rows: the caller numbers output rows as in its input.
    """

    labels: Tensor | None = None
    placeholders: Tensor | None = None
    control: Tensor | None = None
    ids: Tensor | None = None
    contexts: tuple[VisionContext, ...] = ()
    call: Call | None = None
    untouched: Call | None = None
    seconds: float = 0.0
    media: bool = False
    rows: bool = False


class ThreadLoss(threading.local):
    """What the method added to the loss in one thread's last forward pass; it outlives the block."""

    value: Tensor | None = None
