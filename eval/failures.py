"""What `failures.jsonl` says about errors, and which documents of a task it names as lost."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vtc.eval.seen import Seen
from vtc.eval.store import Record

FAULTS = (Exception, SystemExit)
"""What the code of a task or method may raise without ending the sweep."""


class TaskKey(NamedTuple):
    """A task as the files of a store name it."""

    name: str
    fingerprint: str


def failure_record(
    stage: str, task: TaskKey, cells: Sequence[str], doc_ids: Sequence[int], error: BaseException
) -> Record:
    """What `failures.jsonl` says about an error in `stage`: prepare, answer or score."""
    return {
        "stage": stage,
        "task": task.name,
        "task_fp": task.fingerprint,
        "cells": list(cells),
        "doc_ids": list(doc_ids),
        "error": type(error).__name__,
        "reason": " ".join(str(error).split()),
        "traceback": "".join(traceback.format_exception(error)),
    }


def failed_alone(failures: Iterable[Record], task: TaskKey, stages: Sequence[str]) -> dict[int, Record]:
    """The documents of `task` that failures of these stages name one by one, each with its last failure."""
    named = [failure for failure in failures if failure["stage"] in stages and len(failure["doc_ids"]) == 1]
    return {failure["doc_ids"][0]: failure for failure in named if (failure["task"], failure["task_fp"]) == task}


def breaks_the_device(failure: Record) -> bool:
    """Whether the error behind a failure leaves its process without a GPU, as a failed assertion in a kernel does.

    Memory that did not suffice leaves it usable.
    """
    return any(name in failure["traceback"] for name in ("AcceleratorError", "CUDA error"))


def unanswered(failures: Iterable[Record], task: TaskKey, documents: int, seen: Seen) -> dict[int, Record]:
    """The first `documents` of `task` that cannot be prepared and no cell has answered, each with its last failure."""
    lost = failed_alone(failures, task, ["prepare"])
    return {
        doc_id: lost[doc_id] for doc_id in sorted(lost) if doc_id < documents and not seen.has_document(task, doc_id)
    }
