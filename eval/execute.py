"""The loop that fetches missing answers, the same for every kind of worker.

A `Worker` turns items into outcomes and touches no file. A `Pool` holds workers, in this process or in others, and
`run_items` is the only one that hands out items and writes what comes back: items and outcomes are plain values. What a
failure or the loss of a worker costs is decided here, and nowhere else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vtc.errors import VTCError
from vtc.eval.answering import Outcome
from vtc.eval.asked import Asked
from vtc.eval.failures import breaks_the_device, failure_record
from vtc.eval.plan import Item, missing
from vtc.eval.progress import SilentProgress
from vtc.eval.store import Record, Writer

PATIENCE = 8
"""A cell that failed on so many documents in a row is left alone for the rest of a run."""
TRIES = 2
"""How many workers one and the same piece of work may take with it; it is then given up."""


@dataclass(frozen=True)
class Ended:
    """An item is over. lost: what became of the worker, if it is gone before the item was done; empty otherwise."""

    lost: str = ""


class Worker(Protocol):
    """What answers items, such as `vtc.eval.answering.Worker`."""

    def run(self, item: Item, following: Item | None = None) -> Iterator[Outcome]:
        """Outcomes of every cell of `item`, each as soon as it is known; following: what is run next."""


class Pool(Protocol):
    """Workers by number, each with one item at a time."""

    def idle(self) -> int | None:
        """A worker that has nothing to do, if there is one."""

    @property
    def busy(self) -> bool:
        """Whether any worker has an item."""

    def give(self, worker: int, item: Item, following: Item | None) -> None:
        """Let an idle worker run `item`; `following` is what it will be given next, unless others are done earlier."""

    def wait(self) -> tuple[Item, Outcome | Ended]:
        """What happened next to an item that was given: outcomes, then one `Ended`."""


class Here:
    """The pool of one worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._running: tuple[Item, Iterator[Outcome]] | None = None

    def idle(self) -> int | None:
        """Worker 0 between items."""
        return 0 if self._running is None else None

    @property
    def busy(self) -> bool:
        """Whether an item is being run."""
        return self._running is not None

    def give(self, worker: int, item: Item, following: Item | None) -> None:
        """Begin `item`; it is run by `wait`."""
        self._running = item, self._worker.run(item, following)

    def wait(self) -> tuple[Item, Outcome | Ended]:
        """The next outcome of the item.

        Raises:
            VTCError: the device is unusable from now on, for this process.
        """
        assert self._running is not None, "nothing was given"
        item, outcomes = self._running
        outcome = next(outcomes, None)
        if outcome is None:
            self._running = None
            return item, Ended()
        if outcome.failure is not None and breaks_the_device(outcome.failure):
            raise VTCError(
                f"the device failed and this process cannot use it again ({outcome.failure['reason']}); what was"
                " answered is stored and the same command goes on from there. With --engine ray or --workers above 1 a"
                " new process takes the place of such a one"
            )
        return item, outcome


def run_items(
    items: Sequence[Item], tasks: Mapping[str, Asked], pool: Pool, writer: Writer, progress: SilentProgress
) -> list[Record]:
    """Work through `items` with the workers of `pool` and return the failures.

    A cell that fails on several documents alike, or on `PATIENCE` of them in a row, is left alone for the rest of this
    run, on that task; the others go on, and so does a cell that fails on single documents. Everything answered before
    stays stored, and a later run takes up where the cell failed. Work that takes `TRIES` workers with it is done
    document by document, and a document that does so alone is given up.
    """
    books = _Books(items, tasks, writer, progress)
    queue = deque(items)
    ahead: dict[int, Item] = {}  # what each worker was told to expect
    while queue or ahead or pool.busy:
        while (queue or ahead) and (worker := pool.idle()) is not None:
            expected = worker if worker in ahead else None if queue else next(iter(ahead))
            item = books.open(queue.popleft() if expected is None else ahead.pop(expected))
            if item.cells:
                if queue and worker not in ahead:
                    ahead[worker] = queue.popleft()
                pool.give(worker, item, ahead.get(worker))
        if pool.busy:
            item, found = pool.wait()
            if isinstance(found, Outcome):
                books.enter(item.task, found)
            elif found.lost:
                queue.extendleft(reversed(books.after_loss(item, found.lost)))
    return books.failures


class _Books:
    """What has become of the items: rows are stored, failures recorded, and what is left of an item is known."""

    def __init__(
        self, items: Sequence[Item], tasks: Mapping[str, Asked], writer: Writer, progress: SilentProgress
    ) -> None:
        self.failures: list[Record] = []
        self._tasks, self._writer, self._progress = tasks, writer, progress
        self._waiting: Counter[tuple[str, str]] = Counter()
        self._in_a_row: Counter[tuple[str, str]] = Counter()
        self._stopped: set[tuple[str, str]] = set()
        self._failed: set[tuple[str, str, int]] = set()
        self._losses: Counter[tuple[str, tuple[int, ...], str]] = Counter()
        for item in items:
            for cell in item.cells:
                self._waiting[item.task, cell] += self._missing(item.task, cell, item.doc_ids)

    def _missing(self, task: str, cell: str, doc_ids: Sequence[int]) -> int:
        return missing(self._tasks[task], cell, doc_ids, self._writer.seen)

    def enter(self, task: str, outcome: Outcome) -> None:
        """Store what came back."""
        cells = [cell for cell in outcome.cells if (task, cell) not in self._stopped]
        if outcome.failure is not None:
            if cells:  # else another worker had begun before it was stopped
                self._enter_failure(task, outcome.failure, cells)
            return
        self._writer.add_kept(outcome.kept)  # first: what is killed between the two comes again
        stored = self._writer.add_rows(outcome.rows)
        if cells:
            self._waiting[task, cells[0]] -= stored
            self._in_a_row[task, cells[0]] = 0
            self._progress.advance(stored)

    def _enter_failure(self, task: str, failure: Record, cells: Sequence[str]) -> None:
        lost = 0
        for cell in cells:
            place = task, cell
            self._failed |= {(task, cell, doc_id) for doc_id in failure["doc_ids"]}
            self._in_a_row[place] += failure["stage"] == "answer"
            if len(failure["doc_ids"]) > 1 or self._in_a_row[place] >= PATIENCE:
                self._stopped.add(place)
            missed = self._missing(task, cell, failure["doc_ids"])
            missed = self._waiting[place] if place in self._stopped else missed
            self._waiting[place] -= missed
            lost += missed
        self.failures.append(failure)
        self._writer.add_failure(failure)
        self._progress.fail(failure, lost)

    def open(self, item: Item) -> Item:
        """What is left to do of `item`; its documents stay together unless they failed."""

        def failed(cell: str, doc_id: int) -> bool:
            return (item.task, cell, doc_id) in self._failed

        cells = tuple(
            cell
            for cell in item.cells
            if (item.task, cell) not in self._stopped
            and self._missing(item.task, cell, [doc_id for doc_id in item.doc_ids if not failed(cell, doc_id)])
        )
        doc_ids = tuple(doc_id for doc_id in item.doc_ids if not all(failed(cell, doc_id) for cell in cells))
        return replace(item, cells=cells, doc_ids=doc_ids)

    def after_loss(self, item: Item, reason: str) -> list[Item]:
        """What is to be done, and in which order, once a worker was lost in the middle of `item`.

        Workers answer cell by cell, so the first cell without an answer was at work, or its documents were being
        prepared, which only a cell that answered them before excludes.
        """
        rest = self.open(item)
        if not rest.cells:
            return []
        first, others = rest.cells[0], replace(rest, cells=rest.cells[1:])
        self._losses[rest.task, rest.doc_ids, first] += 1
        losses = self._losses[rest.task, rest.doc_ids, first]
        what = f"{rest.task}, documents {rest.doc_ids[0]} to {rest.doc_ids[-1]}"
        if losses < TRIES:
            self._progress.note(f"note: a worker was lost ({reason}) at {what}; another one goes on from there")
            return [rest]
        known = any(self._answered(rest.task, doc_id) for doc_id in rest.doc_ids)
        blamed = (first,) if known else rest.cells
        if len(rest.doc_ids) > 1:
            self._progress.note(f"note: {losses} workers were lost ({reason}) at {what}; they are asked one by one")
            alone = [Item(rest.task, (doc_id,), blamed) for doc_id in rest.doc_ids]
            return [*alone, others] if known else alone
        error = WorkerLost(f"{losses} workers in a row were lost at this document ({reason})")
        stage, key = "answer" if known else "prepare", self._tasks[rest.task].key
        self.enter(rest.task, Outcome(blamed, failure=failure_record(stage, key, blamed, rest.doc_ids, error)))
        return [others] if known else []

    def _answered(self, task: str, doc_id: int) -> bool:
        return self._writer.seen.has_document(self._tasks[task].key, doc_id)


class WorkerLost(VTCError):
    """A process that answered documents ended in the middle of them."""
