"""Score a task once before it is answered, so that what its scoring lacks shows before hours of answers are there."""

from __future__ import annotations

import os
from collections.abc import Callable

from vtc.errors import InputError, one_line
from vtc.eval.catalogue import SweepTask, root_cause
from vtc.eval.outside import Calls, reachable, watching
from vtc.eval.scoring import NotFinite, score
from vtc.eval.store import Record

DOCUMENTS = 2
ANSWERS = ("", "yes")
"""Code that stumbles over an empty answer may still be fine: only a task that can score neither is refused."""


def rehearse(task: SweepTask, note: Callable[[str], None] = lambda text: None) -> None:
    """Run the task's scoring on made-up answers to its first documents; nothing is kept of it.

    Judges and evaluation servers are not called: connections are refused while this runs. For a task that tries to make
    one it is only checked that the API key which its code looks for is set and that the server accepts a connection,
    and `note` is told.

    Raises:
        InputError: scoring fails, the message says for what reason, no API key is set, or no server accepts.
    """
    for text in ANSWERS:
        calls, failure = _attempt(task, text)
        if calls.servers:
            _check_judge(task, calls)
            note(f"note: scoring task {task.name!r} asks {', '.join(calls.servers)}; that was not rehearsed")
            return
        if failure is None or isinstance(failure, NotFinite):  # two equal answers to two questions can come to NaN
            return
    if isinstance(failure, InputError):
        raise failure
    raise InputError(
        f"task {task.name!r} cannot be scored here: {_said(failure)}; install what is missing, or choose another task"
    ) from failure


def _attempt(task: SweepTask, text: str) -> tuple[Calls, BaseException | None]:
    documents = min(DOCUMENTS, len(task.documents))
    rows: list[Record] = [
        {"doc_id": doc_id, "repeat": repeat, "text": text}
        for doc_id in range(documents)
        for repeat in range(task.repeats)
    ]
    with watching(refuse=True) as calls:
        try:
            score(task, rows, documents)
        except (Exception, SystemExit) as error:  # some tasks leave the process where data are missing
            return calls, root_cause(error)
    return calls, None


def _check_judge(task: SweepTask, calls: Calls) -> None:
    if calls.keys and not any(os.environ.get(key) for key in calls.keys):
        raise InputError(
            f"task {task.name!r} is scored by a judge at {', '.join(calls.servers)} and none of "
            f"{', '.join(calls.keys)} is set; set the one it needs, or choose a task that is scored without a judge"
        )
    silent = {host: reason for host, port in calls.servers.items() if (reason := reachable(host, port))}
    if len(silent) == len(calls.servers):
        what = ", ".join(f"{host} ({reason})" for host, reason in silent.items())
        raise InputError(
            f"scoring task {task.name!r} asks {what}, which cannot be reached from here; run it where it can be, set"
            " the address that the task reads, such as OPENAI_API_URL, or choose a task that is scored without a judge"
        )


def _said(error: BaseException | None) -> str:
    assert error is not None
    text = one_line(error)
    return text if text.startswith(type(error).__name__) else f"{type(error).__name__}: {text}"
