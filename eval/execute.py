"""Which answers are missing, and the loop that fetches them.

An item is one fixed block of documents with the cells that lack answers to it. Blocks depend on the batch size only,
never on what is missing, so a resumed sweep sees the batches of an uninterrupted one. Only documents that failed alone
leave their block: the others of it are answered without them, and later runs try each of them once more, alone. A
`Worker` turns items into outcomes and touches no file; `run_local` is the only one that writes. Another executor needs
another loop over workers, and nothing else: items and outcomes are plain values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest

from vtc.app.answer import Batch
from vtc.app.preparation import Chat, alike
from vtc.app.video_reading import VideoReading
from vtc.eval.catalogue import SweepTask
from vtc.eval.cells import Cell
from vtc.eval.failures import FAULTS, failure_record
from vtc.eval.messages import Clips
from vtc.eval.progress import SilentProgress
from vtc.eval.runner import Runner, batch_seed
from vtc.eval.store import Record, RowKey, Writer

Chats = Mapping[int, Chat]
"""Conversations by document."""
Readings = Mapping[int, Chat | BaseException]
"""The same, with what went wrong in the place of those that cannot be read."""
PATIENCE = 8
"""A cell that failed on so many documents in a row is left alone for the rest of a run."""


@dataclass(frozen=True)
class Item:
    """A block of documents of one task, and the keys of the cells that still lack some of its answers."""

    task: str
    doc_ids: tuple[int, ...]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of `cells` on documents of an item: rows of answers, or the failure that prevented them.

    A failure that names one document concerns that document alone; one that names several, all of them alike.
    """

    cells: tuple[str, ...]
    rows: tuple[Record, ...] = ()
    failure: Record | None = None


def plan(
    task: SweepTask,
    documents: int,
    cells: Sequence[str],
    seen: Collection[RowKey],
    batch_size: int,
    apart: Collection[int] = (),
) -> Iterator[Item]:
    """The items that complete `cells` on the first `documents` of `task`, given the rows already `seen`.

    apart: documents that failed alone before; each is an item of its own, behind the others.
    """
    blocks = [range(start, min(documents, start + batch_size)) for start in range(0, documents, batch_size)]
    whole = [tuple(doc_id for doc_id in block if doc_id not in apart) for block in blocks]
    alone = [(doc_id,) for doc_id in sorted(apart) if doc_id < documents]
    for doc_ids in [*whole, *alone]:
        pending = [cell for cell in cells if any(key not in seen for key in _keys(task, cell, doc_ids))]
        if pending:
            yield Item(task.name, doc_ids, tuple(pending))


def missing(task: SweepTask, cell: str, doc_ids: Iterable[int], seen: Collection[RowKey]) -> int:
    """How many answers of `cell` to these documents are not in `seen`."""
    return sum(key not in seen for key in _keys(task, cell, doc_ids))


def _keys(task: SweepTask, cell: str, doc_ids: Iterable[int]) -> Iterator[RowKey]:
    for doc_id in doc_ids:
        for repeat in range(task.repeats):
            yield cell, task.name, task.fingerprint, doc_id, repeat


class Worker:
    """Answers items with one model, each batch encoded once for all cells (but those that act inside the encoder).

    Pictures and videos are read once per document, in a thread that is one item ahead where the next one is known.
    """

    def __init__(
        self, runner: Runner, tasks: Sequence[SweepTask], cells: Sequence[Cell], reading: VideoReading | None = None
    ) -> None:
        self.runner = runner
        self.tasks = {task.name: task for task in tasks}
        self.cells: Mapping[str, Cell] = {cell.key(): cell for cell in cells}
        self.reading = reading
        self._ahead: tuple[Item, Future[Readings]] | None = None
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def close(self) -> None:
        """End the thread; what it still reads is thrown away."""
        self._thread.shutdown(cancel_futures=True)

    def run(self, item: Item, following: Item | None = None) -> Iterator[Outcome]:
        """Outcomes of every cell of `item`, each as soon as it is known.

        A document that cannot be prepared is one failure of all cells, and the others are answered without it. A cell
        that fails on a batch is asked about its documents one by one. following: what is run next, to be read ahead.
        """
        task = self.tasks[item.task]
        chats = self._chats(item)
        if following is not None:
            self._ahead = following, self._thread.submit(self._read, following)
        good = []
        for doc_id, chat in chats.items():
            if isinstance(chat, Chat):
                good.append(doc_id)
            else:
                yield Outcome(item.cells, failure=failure_record("prepare", task.key, item.cells, (doc_id,), chat))
        read = {doc_id: chat for doc_id in good if isinstance(chat := chats[doc_id], Chat)}
        for group in alike(list(read.values())):
            batches, failures = self._prepared(task, item, {good[place]: read[good[place]] for place in group})
            for failure in failures:
                yield Outcome(item.cells, failure=failure)
            for doc_ids, batch in batches:
                yield from self._answered(task, item, {doc_id: read[doc_id] for doc_id in doc_ids}, batch)

    def _chats(self, item: Item) -> Readings:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and (ahead[0].task, ahead[0].doc_ids) == (item.task, item.doc_ids):
            return ahead[1].result()
        return self._read(item)

    def _read(self, item: Item) -> Readings:
        """The conversation of each document, or what went wrong when it was read."""
        clips = Clips(self.reading)
        return {doc_id: self._conversation(self.tasks[item.task], doc_id, clips) for doc_id in item.doc_ids}

    def _conversation(self, task: SweepTask, doc_id: int, clips: Clips) -> Chat | BaseException:
        try:
            return task.conversation(doc_id, clips)
        except FAULTS as error:
            return error

    def _prepared(
        self, task: SweepTask, item: Item, chats: Chats
    ) -> tuple[list[tuple[tuple[int, ...], Batch]], list[Record]]:
        """`chats` as batches, one if possible, and a failure for each that cannot be prepared alone."""
        whole = self._prepare(task, item, chats)
        if isinstance(whole, Batch):
            return [(tuple(chats), whole)], []
        if len(chats) == 1:
            return [], [whole]
        each = {doc_id: self._prepare(task, item, {doc_id: chat}) for doc_id, chat in chats.items()}
        failures = [found for found in each.values() if not isinstance(found, Batch)]
        good = {(doc_id,): found for doc_id, found in each.items() if isinstance(found, Batch)}
        others = {doc_id: chats[doc_id] for (doc_id,) in good}
        together = self._prepare(task, item, others) if failures and others else None
        return [(tuple(others), together)] if isinstance(together, Batch) else list(good.items()), failures

    def _prepare(self, task: SweepTask, item: Item, chats: Chats) -> Batch | Record:
        try:
            return self.runner.prepare(list(chats.values()))
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
            batch = self._prepare(task, item, {doc_id: chat})
            if isinstance(batch, Batch):
                outcomes.append(self._outcome(task, batch, cell, {doc_id: chat}))
        return outcomes if any(outcome.failure is None for outcome in outcomes) else [failed]

    def _outcome(self, task: SweepTask, batch: Batch, cell: Cell, chats: Chats) -> Outcome:
        try:
            return Outcome((cell.key(),), rows=self._answers(task, batch, cell, chats))
        except FAULTS as error:
            record = failure_record("answer", task.key, (cell.key(),), tuple(chats), error)
            return Outcome((cell.key(),), failure=record)

    def _answers(self, task: SweepTask, batch: Batch, cell: Cell, chats: Chats) -> tuple[Record, ...]:
        generation, key, doc_ids = task.generation(cell.generation), cell.key(), tuple(chats)
        before = batch.visual_tokens
        if cell.scales is not None:
            batch = self.runner.scaled(list(chats.values()), cell.scales, batch)
        rows: list[Record] = []
        for repeat in range(task.repeats):
            seed = batch_seed(cell.seed, task.name, doc_ids[0], repeat)
            answers = self.runner.answer(batch, cell, generation, seed=seed)
            where = {"cell": key, "task": task.name, "task_fp": task.fingerprint, "repeat": repeat}
            for doc_id, answer, tokens in zip(doc_ids, answers, before, strict=True):
                rows.append({**where, "doc_id": doc_id, **vars(answer), "visual_tokens_in": tokens})
        return tuple(rows)


def run_local(items: Sequence[Item], worker: Worker, writer: Writer, progress: SilentProgress) -> list[Record]:
    """Work through `items` in this process and return the failures.

    A cell that fails on several documents alike, or on `PATIENCE` of them in a row, is left alone for the rest of this
    run, on that task; the others go on, and so does a cell that fails on single documents. Everything answered before
    stays stored, and a later run takes up where the cell failed.
    """
    tasks = worker.tasks
    waiting: Counter[tuple[str, str]] = Counter()
    in_a_row: Counter[tuple[str, str]] = Counter()
    for item in items:
        for cell in item.cells:
            waiting[item.task, cell] += missing(tasks[item.task], cell, item.doc_ids, writer.seen)
    failures: list[Record] = []
    stopped: set[tuple[str, str]] = set()
    for item, following in zip_longest(items, items[1:]):
        cells = tuple(cell for cell in item.cells if (item.task, cell) not in stopped)
        if not cells:
            continue
        for outcome in worker.run(replace(item, cells=cells), following):
            if outcome.failure is None:
                stored = writer.add_rows(outcome.rows)
                waiting[item.task, outcome.cells[0]] -= stored
                in_a_row[item.task, outcome.cells[0]] = 0
                progress.advance(stored)
                continue
            failure, lost = outcome.failure, 0
            for cell in outcome.cells:
                place = item.task, cell
                in_a_row[place] += failure["stage"] == "answer"
                if len(failure["doc_ids"]) > 1 or in_a_row[place] >= PATIENCE:
                    stopped.add(place)
                missed = missing(tasks[item.task], cell, failure["doc_ids"], writer.seen)
                missed = waiting[place] if place in stopped else missed
                waiting[place] -= missed
                lost += missed
            failures.append(failure)
            writer.add_failure(failure)
            progress.fail(failure, lost)
    return failures
