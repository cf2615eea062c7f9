"""Planning and the loop, with a worker that needs no model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtc.app.answer import Batch
from vtc.app.preparation import Chat
from vtc.eval.answering import Outcome, Worker
from vtc.eval.execute import PATIENCE, Here, run_items
from vtc.eval.failures import TaskKey, failed_alone, failure_record, unanswered
from vtc.eval.plan import Item, missing, plan
from vtc.eval.progress import SilentProgress
from vtc.eval.seen import Seen
from vtc.eval.store import Store, row_key

TASK: Any = SimpleNamespace(name="t", fingerprint="f", repeats=1, key=TaskKey("t", "f"))


def row(cell: str, doc_id: int) -> dict[str, Any]:
    return {"cell": cell, "task": "t", "task_fp": "f", "repeat": 0, "doc_id": doc_id, "text": f"{cell}{doc_id}"}


class FakeWorker:
    """Answers everything but what `fails` says."""

    def __init__(self, fails: set[tuple[str, int]] = frozenset(), prepare: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.tasks = {"t": TASK}
        self.fails, self.unreadable = fails, prepare
        self.asked: list[Item] = []

    def run(self, item: Item, following: Item | None = None) -> Iterator[Outcome]:
        self.asked.append(item)
        if self.unreadable & set(item.doc_ids):
            error = OSError("picture is broken")
            yield Outcome(item.cells, failure=failure_record("prepare", TASK.key, item.cells, item.doc_ids, error))
            return
        for cell in item.cells:
            if {(cell, doc_id) for doc_id in item.doc_ids} & self.fails:
                error = ValueError("no such\n  token")  # type: ignore[assignment]
                yield Outcome((cell,), failure=failure_record("answer", TASK.key, (cell,), item.doc_ids, error))
            else:
                yield Outcome((cell,), rows=tuple(row(cell, doc_id) for doc_id in item.doc_ids))


class Recorder(SilentProgress):
    """Adds up what the loop reports."""

    def __init__(self) -> None:
        self.answers, self.lost = 0, 0

    def advance(self, count: int, status: str = "") -> None:
        self.answers += count

    def fail(self, failure: dict[str, Any], lost: int) -> None:
        self.lost += lost


def test_blocks_do_not_depend_on_what_is_missing() -> None:
    everything = list(plan(TASK, 10, ["a", "b"], set(), 4))
    assert [item.doc_ids for item in everything] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    seen = {row_key(row("a", doc_id)) for doc_id in range(10)} | {
        row_key(row("b", doc_id)) for doc_id in (0, 1, 2, 3, 5)
    }
    left = list(plan(TASK, 10, ["a", "b"], seen, 4))
    assert [(item.doc_ids, item.cells) for item in left] == [((4, 5, 6, 7), ("b",)), ((8, 9), ("b",))]
    assert missing(TASK, "b", range(10), seen) == 5
    assert missing(TASK, "a", range(12), seen) == 2


def test_every_repeat_of_a_question_is_wanted() -> None:
    twice: Any = SimpleNamespace(name="t", fingerprint="f", repeats=2)
    assert missing(twice, "a", range(3), {row_key(row("a", 0))}) == 5


def run(folder: Path, worker: FakeWorker, documents: int = 10) -> tuple[list[Any], list[str], Recorder]:
    store, progress = Store(folder), Recorder()
    with store.writing() as writer:
        writer.save_run({"model": {}, "tasks": {}, "sweeps": []})
        failures = run_items(
            list(plan(TASK, documents, ["a", "b"], writer.seen, 4)), worker.tasks, Here(worker), writer, progress
        )  # type: ignore[arg-type]
    return failures, sorted(r["text"] for r in store.rows()), progress


def test_a_cell_that_fails_stops_alone_and_is_taken_up_later(tmp_path: Path) -> None:
    failures, texts, progress = run(tmp_path, worker := FakeWorker(fails={("b", 5)}))
    assert texts == sorted([f"a{n}" for n in range(10)] + [f"b{n}" for n in range(4)])
    assert [item.cells for item in worker.asked] == [("a", "b"), ("a", "b"), ("a",)]
    assert (progress.answers, progress.lost) == (14, 6)
    (failure,) = failures
    assert failure == Store(tmp_path).failures()[0]
    assert (failure["cells"], failure["doc_ids"], failure["error"]) == (["b"], [4, 5, 6, 7], "ValueError")
    assert failure["reason"] == "no such token" and "ValueError" in failure["traceback"]
    failures, texts, _ = run(tmp_path, worker := FakeWorker())
    assert not failures and len(texts) == 20
    assert [(item.doc_ids[0], item.cells) for item in worker.asked] == [(4, ("b",)), (8, ("b",))]


def test_documents_that_failed_alone_leave_their_block() -> None:
    failures = [
        failure_record("prepare", TASK.key, ["a", "b"], [5], OSError("broken")),
        failure_record("answer", TASK.key, ["b"], [1], MemoryError("too large")),
        failure_record("answer", TASK.key, ["b"], [4, 5, 6, 7], ValueError("all alike")),
        failure_record("prepare", TaskKey("t", "g"), ["a"], [2], OSError("of another version of the task")),
    ]
    apart = failed_alone(failures, TASK.key, ["prepare", "answer"])
    assert sorted(apart) == [1, 5] and apart[5]["reason"] == "broken"
    items = list(plan(TASK, 10, ["a", "b"], {row_key(row("a", 1))}, 4, apart))
    assert [item.doc_ids for item in items] == [(0, 2, 3), (4, 6, 7), (8, 9), (1,), (5,)]
    assert items[3].cells == ("b",)
    seen = Seen()
    assert list(unanswered(failures, TASK.key, 10, seen)) == [5]
    assert not unanswered(failures, TASK.key, 5, seen)
    seen.add(row_key(row("a", 5)), 0)
    assert not unanswered(failures, TASK.key, 10, seen)


def test_documents_beyond_the_limit_are_not_asked_again() -> None:
    """They may have failed in a run without one."""
    items = list(plan(TASK, 6, ["a"], set(), 4, {1, 5, 6, 9}))
    assert [item.doc_ids for item in items] == [(0, 2, 3), (4,), (1,), (5,)]


def test_a_cell_that_fails_on_one_document_after_the_other_is_given_up(tmp_path: Path) -> None:
    """With one document to a batch, a broken method cannot be told from a broken document; patience ends."""
    store, progress, bad = Store(tmp_path), Recorder(), {("b", n) for n in range(100)} - {("b", 2)}
    worker = FakeWorker(fails=bad)
    with store.writing() as writer:
        failures = run_items(
            list(plan(TASK, 30, ["a", "b"], writer.seen, 1)), worker.tasks, Here(worker), writer, progress
        )  # type: ignore[arg-type]
    assert [failure["doc_ids"][0] for failure in failures] == [0, 1, *range(3, 3 + PATIENCE)]
    assert (progress.answers, progress.lost) == (31, 29)
    assert sum("b" in item.cells for item in worker.asked) == 3 + PATIENCE


def test_an_interrupt_is_not_a_failure(tmp_path: Path) -> None:
    class Interrupted(FakeWorker):
        def run(self, item: Item, following: Item | None = None) -> Iterator[Outcome]:
            yield Outcome(("a",), rows=(row("a", item.doc_ids[0]),))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted())
    assert Store(tmp_path).failures() == [] and len(list(Store(tmp_path).rows())) == 1


class FakeRunner:
    """Prepares anything; answers with the cell's name, and fails as told, alone or only while the encoder is shared."""

    def __init__(
        self,
        fails: set[str] = frozenset(),  # type: ignore[assignment]
        fails_shared: bool = False,
        unreadable: set[int] = frozenset(),  # type: ignore[assignment]
        heavy: set[int] = frozenset(),  # type: ignore[assignment]
        missing: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> None:
        self.missing = missing
        self.fails, self.fails_shared, self.inside = fails, fails_shared, False
        self.unreadable, self.heavy = unreadable, heavy
        self.prepared: list[tuple[int, ...]] = []

    def sharing(self, cells: list[Any]) -> FakeRunner:
        return self

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def moved(self, batch: Any) -> Any:
        return batch

    def prepare(self, conversations: list[Any]) -> Any:
        return self.preprocess(conversations)

    def preprocess(self, conversations: list[Any]) -> Any:
        numbers = [int(chat.source) for chat in conversations]
        self.prepared.append(tuple(numbers))
        if self.unreadable & set(numbers):
            raise SystemExit("a task's code gave up")
        return Batch({"ids": numbers}, (1,) * len(numbers))

    def answer(self, batch: Any, cell: Any, generation: Any, seed: int, trace: Any) -> list[Any]:
        if self.heavy & set(batch.inputs["ids"]) and cell.key() == "c":
            raise MemoryError("out of memory")
        if cell.key() in self.fails or (self.fails_shared and self.inside):
            raise RuntimeError(f"{cell.key()} cannot")
        return [SimpleNamespace(text=f"{cell.key()}{number}", visual_tokens_in=1) for number in batch.inputs["ids"]]


def asked(runner: FakeRunner, doc_ids: tuple[int, ...] = (0, 1, 2, 3)) -> list[Outcome]:
    """What the cells a, b and c make of a block."""
    cells: list[Any] = [SimpleNamespace(key=lambda k=k: k, seed=0, generation={}, scales=None) for k in "abc"]

    def conversation(doc_id: int, clips: Any) -> Chat:
        if doc_id in runner.missing:
            raise OSError("no such file")
        return Chat([], str(doc_id))

    task: Any = SimpleNamespace(**vars(TASK), conversation=conversation, generation=lambda overrides: None)
    return list(Worker(runner, [task], cells).run(Item("t", doc_ids, ("a", "b", "c"))))  # type: ignore[arg-type]


def test_a_document_that_cannot_be_prepared_costs_no_other() -> None:
    """Even where its task's code calls sys.exit."""
    runner = FakeRunner(unreadable={1, 3})
    outcomes = asked(runner)
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    assert [(f["stage"], f["doc_ids"], f["cells"]) for f in failures] == [
        ("prepare", [1], ["a", "b", "c"]), ("prepare", [3], ["a", "b", "c"]),
    ]  # fmt: skip
    assert [[r["text"] for r in outcome.rows] for outcome in outcomes if outcome.rows] == [
        ["a0", "a2"], ["b0", "b2"], ["c0", "c2"],
    ]  # fmt: skip
    assert runner.prepared[-1] == (0, 2)  # the others stay together
    assert [outcome.failure["doc_ids"] for outcome in asked(FakeRunner(unreadable={5}), (5,)) if outcome.failure] == [
        [5]
    ]


def test_a_document_that_cannot_be_read_costs_no_other() -> None:
    runner = FakeRunner(missing={1})
    outcomes = asked(runner)
    assert [(o.failure["doc_ids"], o.failure["reason"]) for o in outcomes if o.failure] == [([1], "no such file")]
    assert runner.prepared == [(0, 2, 3)]
    assert sum(len(outcome.rows) for outcome in outcomes) == 9


def test_the_next_item_is_made_ready_ahead_and_once() -> None:
    """Read and preprocessed in a thread, but moved to the device when its turn comes."""
    read: list[tuple[int, str]] = []
    made: list[tuple[str, tuple[int, ...], str]] = []

    class Noting(FakeRunner):
        def preprocess(self, conversations: list[Any]) -> Any:
            batch = super().preprocess(conversations)
            made.append(("made", tuple(batch.inputs["ids"]), threading.current_thread().name.rpartition("_")[0]))
            return batch

        def moved(self, batch: Any) -> Any:
            made.append(("moved", tuple(batch.inputs["ids"]), threading.current_thread().name.rpartition("_")[0]))
            return batch

    def conversation(doc_id: int, clips: Any) -> Chat:
        read.append((doc_id, threading.current_thread().name))
        return Chat([], str(doc_id))

    cells: list[Any] = [SimpleNamespace(key=lambda: "a", seed=0, generation={}, scales=None)]
    task: Any = SimpleNamespace(**vars(TASK), conversation=conversation, generation=lambda overrides: None)
    worker = Worker(Noting(), [task], cells)  # type: ignore[arg-type]
    items = [Item("t", (0, 1), ("a",)), Item("t", (2, 3), ("a",)), Item("t", (7,), ("a",))]
    assert [len(o.rows) for o in worker.run(items[0], items[1])] == [2]
    assert [len(o.rows) for o in worker.run(items[1])] == [2]
    assert [len(o.rows) for o in worker.run(items[2])] == [1]
    worker.close()
    ahead = {doc_id for doc_id, thread in read if thread.startswith("read-ahead")}
    assert [doc_id for doc_id, _ in read] == [0, 1, 2, 3, 7] and ahead == {2, 3}
    assert [ids for step, ids, thread in made if step == "made" and thread == "read-ahead"] == [(2, 3)]
    assert [(ids, thread) for step, ids, thread in made if step == "moved"] == [((0, 1), ""), ((2, 3), ""), ((7,), "")]


def test_what_finds_no_room_together_is_answered_alone() -> None:
    class Small(FakeRunner):
        def moved(self, batch: Any) -> Any:
            raise MemoryError("no room")

    outcomes = asked(Small(), (0, 1))
    assert [[r["text"] for r in o.rows] for o in outcomes] == [[f"{cell}{n}"] for n in (0, 1) for cell in "abc"]


def test_a_document_that_one_cell_cannot_answer_costs_no_other() -> None:
    outcomes = asked(FakeRunner(heavy={2}))
    texts = [r["text"] for outcome in outcomes for r in outcome.rows]
    assert texts == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3", "c0", "c1", "c3"]
    (failure,) = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    assert (failure["cells"], failure["doc_ids"], failure["error"]) == (["c"], [2], "MemoryError")


@pytest.mark.parametrize("fails_shared", [False, True])
def test_only_the_cell_at_fault_fails(fails_shared: bool) -> None:
    outcomes = {outcome.cells[0]: outcome for outcome in asked(FakeRunner({"b"}, fails_shared), (0, 1))}
    assert outcomes["b"].failure is not None and outcomes["b"].failure["doc_ids"] == [0, 1]
    assert outcomes["b"].failure is not None and outcomes["b"].failure["reason"] == "b cannot"
    assert [r["text"] for r in outcomes["a"].rows + outcomes["c"].rows] == ["a0", "a1", "c0", "c1"]
