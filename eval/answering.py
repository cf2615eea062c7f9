"""What answers items with one model: preprocessed ahead and once, encoded once, answered cell by cell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vtc.app.answer import Batch
from vtc.app.preparation import Chat, alike
from vtc.app.video_reading import VideoReading
from vtc.batch.trace import CallRecord
from vtc.eval.catalogue import SweepTask
from vtc.eval.cells import Cell
from vtc.eval.failures import FAULTS, failure_record
from vtc.eval.kept import kept_records, recorded
from vtc.eval.messages import Clips
from vtc.eval.plan import Item
from vtc.eval.runner import Runner, batch_seed
from vtc.eval.store import Record

Chats = Mapping[int, Chat]
"""Conversations by document."""


@dataclass(frozen=True)
class Outcome:
    """What became of `cells` on documents of an item: rows of answers, or the failure that prevented them.

    kept: which tokens were kept of those documents that `vtc.eval.kept` records.

    A failure that names one document concerns that document alone; one that names several, all of them alike.
    """

    cells: tuple[str, ...]
    rows: tuple[Record, ...] = ()
    kept: tuple[Record, ...] = ()
    failure: Record | None = None


@dataclass(frozen=True)
class Ready:
    """An item's documents in batches on the CPU, and a failure for each that cannot be read or prepared."""

    batches: list[tuple[Chats, Batch]]
    failures: list[Record]


class Worker:
    """Answers items with one model, each batch encoded once for all cells (but those that act inside the encoder).

    Pictures and videos are read and preprocessed once per document, in a thread that is one item ahead where the next
    one is known. What it makes stays in the memory of the host until its turn comes.
    """

    def __init__(
        self, runner: Runner, tasks: Sequence[SweepTask], cells: Sequence[Cell], reading: VideoReading | None = None
    ) -> None:
        self.runner = runner
        self.tasks = {task.name: task for task in tasks}
        self.cells: Mapping[str, Cell] = {cell.key(): cell for cell in cells}
        self.reading = reading
        self._ahead: tuple[Item, Future[Ready]] | None = None
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def close(self) -> None:
        """End the thread; what it still makes is thrown away."""
        self._thread.shutdown(cancel_futures=True)

    def run(self, item: Item, following: Item | None = None) -> Iterator[Outcome]:
        """Outcomes of every cell of `item`, each as soon as it is known.

        A document that cannot be prepared is one failure of all cells, and the others are answered without it. A cell
        that fails on a batch is asked about its documents one by one. following: what is run next, to be made ready
        ahead.
        """
        task = self.tasks[item.task]
        ready = self._ready(item)
        if following is not None:
            self._ahead = following, self._thread.submit(self._made, following)
        for failure in ready.failures:
            yield Outcome(item.cells, failure={**failure, "cells": list(item.cells)})  # fewer than when it was made
        for chats, batch in ready.batches:
            moved, failures = self._batches(
                task, item, chats, functools.partial(self.runner.moved, batch), self.runner.prepare
            )
            for failure in failures:
                yield Outcome(item.cells, failure=failure)
            for together, there in moved:
                yield from self._answered(task, item, together, there)

    def _ready(self, item: Item) -> Ready:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead[0].task, ahead[0].doc_ids) == (item.task, item.doc_ids):
            return ahead[1].result()
        return self._made(item)

    def _made(self, item: Item) -> Ready:
        """Read and preprocess an item's documents, as many in a batch as go together."""
        task, clips = self.tasks[item.task], Clips(self.reading)
        read: dict[int, Chat] = {}
        ready = Ready([], [])
        for doc_id in item.doc_ids:
            try:
                read[doc_id] = task.conversation(doc_id, clips)
            except FAULTS as error:
                ready.failures.append(failure_record("prepare", task.key, item.cells, (doc_id,), error))
        doc_ids = list(read)
        for group in alike(list(read.values())):
            chats = {doc_ids[place]: read[doc_ids[place]] for place in group}
            whole = functools.partial(self.runner.preprocess, list(chats.values()))
            batches, failures = self._batches(task, item, chats, whole, self.runner.preprocess)
            ready.batches.extend(batches)
            ready.failures.extend(failures)
        return ready

    def _batches(
        self,
        task: SweepTask,
        item: Item,
        chats: Chats,
        whole: Callable[[], Batch],
        make: Callable[[Sequence[Chat]], Batch],
    ) -> tuple[list[tuple[Chats, Batch]], list[Record]]:
        """`chats` in one batch if `whole` makes it; if not, those that `make` can, and a failure for each other one."""
        found = self._tried(task, item, chats, whole)
        if isinstance(found, Batch):
            return [(chats, found)], []
        if len(chats) == 1:
            return [], [found]
        good: list[tuple[Chats, Batch]] = []
        failures: list[Record] = []
        for doc_id, chat in chats.items():
            alone = {doc_id: chat}
            found = self._tried(task, item, alone, functools.partial(make, [chat]))
            if isinstance(found, Batch):
                good.append((alone, found))
            else:
                failures.append(found)
        if failures and good:
            others = {doc_id: chat for alone, _ in good for doc_id, chat in alone.items()}
            found = self._tried(task, item, others, functools.partial(make, list(others.values())))
            if isinstance(found, Batch):
                return [(others, found)], failures
        return good, failures

    def _tried(self, task: SweepTask, item: Item, chats: Chats, make: Callable[[], Batch]) -> Batch | Record:
        try:
            return make()
        except FAULTS as error:
            return failure_record("prepare", task.key, item.cells, tuple(chats), error)

    def _answered(self, task: SweepTask, item: Item, chats: Chats, batch: Batch) -> Iterator[Outcome]:
        pending = [cell for cell in self.cells.values() if cell.key() in item.cells]
        again = []
        with self.runner.sharing(pending):
            for cell in pending:
                outcome = self._outcome(task, batch, cell, chats)
                if outcome.failure is None:
                    yield outcome
                else:
                    again.append(cell)
        for cell in again:  # alone, where nothing but its own method can make a cell fail
            outcome = self._outcome(task, batch, cell, chats)
            yield from [outcome] if outcome.failure is None else self._one_by_one(task, item, cell, chats, outcome)

    def _one_by_one(self, task: SweepTask, item: Item, cell: Cell, chats: Chats, failed: Outcome) -> list[Outcome]:
        """The outcomes of every document of a batch that failed; just `failed` if none of them can be answered."""
        outcomes = []
        for doc_id, chat in chats.items() if len(chats) > 1 else ():
            batch = self._tried(task, item, {doc_id: chat}, functools.partial(self.runner.prepare, [chat]))
            if isinstance(batch, Batch):
                outcomes.append(self._outcome(task, batch, cell, {doc_id: chat}))
        return outcomes if any(outcome.failure is None for outcome in outcomes) else [failed]

    def _outcome(self, task: SweepTask, batch: Batch, cell: Cell, chats: Chats) -> Outcome:
        try:
            return self._answers(task, batch, cell, chats)
        except FAULTS as error:
            record = failure_record("answer", task.key, (cell.key(),), tuple(chats), error)
            return Outcome((cell.key(),), failure=record)

    def _answers(self, task: SweepTask, batch: Batch, cell: Cell, chats: Chats) -> Outcome:
        generation, key, doc_ids = task.generation(cell.generation), cell.key(), tuple(chats)
        before = batch.visual_tokens
        if cell.scales is not None:
            batch = self.runner.scaled(list(chats.values()), cell.scales, batch)
        where = {"cell": key, "task": task.name, "task_fp": task.fingerprint}
        rows: list[Record] = []
        trace: list[CallRecord] | None = [] if any(map(recorded, doc_ids)) else None
        for repeat in range(task.repeats):
            seed = batch_seed(cell.seed, task.name, doc_ids[0], repeat)
            answers = self.runner.answer(batch, cell, generation, seed=seed, trace=trace if repeat == 0 else None)
            for doc_id, answer, tokens in zip(doc_ids, answers, before, strict=True):
                rows.append({**where, "repeat": repeat, "doc_id": doc_id, **vars(answer), "visual_tokens_in": tokens})
        kept = [{**where, **each} for call in trace or () for each in kept_records(call, chats, self.runner.processor)]
        return Outcome((key,), tuple(rows), tuple(kept))
