"""What answers items with one model: read ahead, prepared once, encoded once, answered cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from vtc.app.answer import Batch
from vtc.app.preparation import Chat, alike
from vtc.app.video_reading import VideoReading
from vtc.eval.catalogue import SweepTask
from vtc.eval.cells import Cell
from vtc.eval.failures import FAULTS, failure_record
from vtc.eval.messages import Clips
from vtc.eval.plan import Item
from vtc.eval.runner import Runner, batch_seed
from vtc.eval.store import Record

Chats = Mapping[int, Chat]
"""Conversations by document."""
Readings = Mapping[int, Chat | BaseException]
"""The same, with what went wrong in the place of those that cannot be read."""


@dataclass(frozen=True)
class Outcome:
    """What became of `cells` on documents of an item: rows of answers, or the failure that prevented them.

    A failure that names one document concerns that document alone; one that names several, all of them alike.
    """

    cells: tuple[str, ...]
    rows: tuple[Record, ...] = ()
    failure: Record | None = None


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
        read: dict[int, Chat] = {}
        for doc_id, chat in chats.items():
            if isinstance(chat, Chat):
                read[doc_id] = chat
            else:
                yield Outcome(item.cells, failure=failure_record("prepare", task.key, item.cells, (doc_id,), chat))
        doc_ids = list(read)
        for group in alike(list(read.values())):
            batches, failures = self._prepared(task, item, {doc_ids[place]: read[doc_ids[place]] for place in group})
            for failure in failures:
                yield Outcome(item.cells, failure=failure)
            for together, batch in batches:
                yield from self._answered(task, item, {doc_id: read[doc_id] for doc_id in together}, batch)

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
