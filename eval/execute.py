"""Which answers are missing, and the loop that fetches them.

An item is one fixed block of documents with the cells that lack answers to it. Blocks depend on the batch size only,
never on what is missing, so a resumed sweep sees the batches of an uninterrupted one. A `Worker` turns items into
outcomes and touches no file; `run_local` is the only one that writes. Another executor needs another loop over
workers, and nothing else: items and outcomes are plain values.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vtc.eval.catalogue import SweepTask
from vtc.eval.cells import Cell
from vtc.eval.runner import Batch, Runner, batch_seed
from vtc.eval.store import Record, RowKey, Writer


@dataclass(frozen=True)
class Item:
    """A block of documents of one task, and the keys of the cells that still lack some of its answers."""

    task: str
    doc_ids: tuple[int, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of `cells` on an item: rows of answers, or the failure that prevented them."""

    cells: tuple[str, ...]
    rows: tuple[Record, ...] = ()
    failure: Record | None = None


class Progress(Protocol):
    """Where the loop reports to."""

    def start(self, total: int, done: int) -> None:
        """`total` answers are wanted, `done` of them are stored already."""

    def advance(self, answers: int) -> None:
        """So many more are stored."""

    def fail(self, failure: Record, lost: int) -> None:
        """A failure was recorded; `lost` answers will not be fetched in this run."""


def plan(
    task: SweepTask, documents: int, cells: Sequence[str], seen: Collection[RowKey], batch_size: int
) -> Iterator[Item]:
    """The items that complete `cells` on the first `documents` of `task`, given the rows already `seen`."""
    for start in range(0, documents, batch_size):
        doc_ids = range(start, min(documents, start + batch_size))
        pending = [cell for cell in cells if any(key not in seen for key in _keys(task, cell, doc_ids))]
        if pending:
            yield Item(task.name, tuple(doc_ids), tuple(pending))


def missing(task: SweepTask, cell: str, doc_ids: Iterable[int], seen: Collection[RowKey]) -> int:
    """How many answers of `cell` to these documents are not in `seen`."""
    return sum(key not in seen for key in _keys(task, cell, doc_ids))


def _keys(task: SweepTask, cell: str, doc_ids: Iterable[int]) -> Iterator[RowKey]:
    for doc_id in doc_ids:
        for repeat in range(task.repeats):
            yield cell, task.name, task.fingerprint, doc_id, repeat


class Worker:
    """Answers items with one model, each batch encoded once for all cells (but those that act inside the encoder)."""

    def __init__(self, runner: Runner, tasks: Sequence[SweepTask], cells: Sequence[Cell]) -> None:
        self.runner = runner
        self.tasks = {task.name: task for task in tasks}
        self.cells: Mapping[str, Cell] = {cell.key(): cell for cell in cells}

    def run(self, item: Item) -> Iterator[Outcome]:
        """One outcome per cell of `item`, each as soon as it is known; one for all if the batch cannot be prepared."""
        task = self.tasks[item.task]
        try:
            batch = self.runner.prepare([task.conversation(doc_id) for doc_id in item.doc_ids])
        except Exception as error:
            yield Outcome(item.cells, failure=failure_record("prepare", task, item.cells, item.doc_ids, error))
            return
        pending = [cell for cell in self.cells.values() if cell.key() in item.cells]
        again = []
        with self.runner.sharing(pending):
            for cell in pending:
                outcome = self._outcome(task, batch, cell, item.doc_ids)
                if outcome.failure is None:
                    yield outcome
                else:
                    again.append(cell)
        for cell in again:  # alone, where nothing but its own method can make a cell fail
            yield self._outcome(task, batch, cell, item.doc_ids)

    def _outcome(self, task: SweepTask, batch: Batch, cell: Cell, doc_ids: Sequence[int]) -> Outcome:
        try:
            return Outcome((cell.key(),), rows=self._answers(task, batch, cell, doc_ids))
        except Exception as error:
            return Outcome((cell.key(),), failure=failure_record("answer", task, (cell.key(),), doc_ids, error))

    def _answers(self, task: SweepTask, batch: Batch, cell: Cell, doc_ids: Sequence[int]) -> tuple[Record, ...]:
        generation, key = task.generation(cell.generation), cell.key()
        rows: list[Record] = []
        for repeat in range(task.repeats):
            seed = batch_seed(cell.seed, task.name, doc_ids[0], repeat)
            answers = self.runner.answer(batch, cell, generation, seed=seed)
            where = {"cell": key, "task": task.name, "task_fp": task.fingerprint, "repeat": repeat}
            for doc_id, answer in zip(doc_ids, answers, strict=True):
                rows.append({**where, "doc_id": doc_id, **vars(answer)})
        return tuple(rows)


def failure_record(
    stage: str, task: SweepTask, cells: Sequence[str], doc_ids: Sequence[int], error: BaseException
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


def run_local(items: Sequence[Item], worker: Worker, writer: Writer, progress: Progress) -> list[Record]:
    """Work through `items` in this process and return the failures.

    A cell that fails is left alone for the rest of this run, on that task; the others go on. Everything answered before
    stays stored, and a later run takes up where the cell failed.
    """
    tasks = worker.tasks
    waiting: Counter[tuple[str, str]] = Counter()
    for item in items:
        for cell in item.cells:
            waiting[item.task, cell] += missing(tasks[item.task], cell, item.doc_ids, writer.seen)
    failures: list[Record] = []
    stopped: set[tuple[str, str]] = set()
    for item in items:
        cells = tuple(cell for cell in item.cells if (item.task, cell) not in stopped)
        if not cells:
            continue
        for outcome in worker.run(replace(item, cells=cells)):
            if outcome.failure is None:
                stored = writer.add_rows(outcome.rows)
                waiting[item.task, outcome.cells[0]] -= stored
                progress.advance(stored)
            else:
                stopped |= {(item.task, cell) for cell in outcome.cells}
                failures.append(outcome.failure)
                writer.add_failure(outcome.failure)
                progress.fail(outcome.failure, sum(waiting[item.task, cell] for cell in outcome.cells))
    return failures
