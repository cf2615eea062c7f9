"""Planning and the loop, with a worker that needs no model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtc.eval.execute import Item, Outcome, Worker, failure_record, missing, plan, run_local
from vtc.eval.progress import SilentProgress
from vtc.eval.store import Store, row_key

TASK: Any = SimpleNamespace(name="t", fingerprint="f", repeats=1)


def row(cell: str, doc_id: int) -> dict[str, Any]:
    return {"cell": cell, "task": "t", "task_fp": "f", "repeat": 0, "doc_id": doc_id, "text": f"{cell}{doc_id}"}


class FakeWorker:
    """Answers everything but what `fails` says."""

    def __init__(self, fails: set[tuple[str, int]] = frozenset(), prepare: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.tasks = {"t": TASK}
        self.fails, self.unreadable = fails, prepare
        self.asked: list[Item] = []

    def run(self, item: Item) -> Iterator[Outcome]:
        self.asked.append(item)
        if self.unreadable & set(item.doc_ids):
            error = OSError("picture is broken")
            yield Outcome(item.cells, failure=failure_record("prepare", TASK, item.cells, item.doc_ids, error))
            return
        for cell in item.cells:
            if {(cell, doc_id) for doc_id in item.doc_ids} & self.fails:
                error = ValueError("no such\n  token")  # type: ignore[assignment]
                yield Outcome((cell,), failure=failure_record("answer", TASK, (cell,), item.doc_ids, error))
            else:
                yield Outcome((cell,), rows=tuple(row(cell, doc_id) for doc_id in item.doc_ids))


class Recorder(SilentProgress):
    """Adds up what the loop reports."""

    def __init__(self) -> None:
        self.answers, self.lost = 0, 0

    def advance(self, answers: int) -> None:
        self.answers += answers

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
        failures = run_local(list(plan(TASK, documents, ["a", "b"], writer.seen, 4)), worker, writer, progress)  # type: ignore[arg-type]
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


def test_a_batch_that_cannot_be_prepared_stops_its_task(tmp_path: Path) -> None:
    failures, texts, progress = run(tmp_path, FakeWorker(prepare={6}))
    assert [failure["stage"] for failure in failures] == ["prepare"]
    assert len(texts) == 8 and progress.lost == 12


def test_an_interrupt_is_not_a_failure(tmp_path: Path) -> None:
    class Interrupted(FakeWorker):
        def run(self, item: Item) -> Iterator[Outcome]:
            yield Outcome(("a",), rows=(row("a", item.doc_ids[0]),))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted())
    assert Store(tmp_path).failures() == [] and len(list(Store(tmp_path).rows())) == 1


class FakeRunner:
    """Prepares anything; answers with the cell's name, and fails as told, alone or only while the encoder is shared."""

    def __init__(self, fails: set[str] = frozenset(), fails_shared: bool = False) -> None:  # type: ignore[assignment]
        self.fails, self.fails_shared, self.inside = fails, fails_shared, False

    def sharing_groups(self, cells: list[Any]) -> list[list[Any]]:
        return [list(cells)]

    def sharing(self, cells: list[Any]) -> FakeRunner:
        return self

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def prepare(self, conversations: list[Any]) -> list[Any]:
        return conversations

    def answer(self, batch: list[Any], cell: Any, generation: Any, seed: int) -> list[Any]:
        if cell.key() in self.fails or (self.fails_shared and self.inside):
            raise RuntimeError(f"{cell.key()} cannot")
        return [SimpleNamespace(text=cell.key()) for _ in batch]


@pytest.mark.parametrize("fails_shared", [False, True])
def test_only_the_cell_at_fault_fails(fails_shared: bool) -> None:
    cells: list[Any] = [SimpleNamespace(key=lambda k=k: k, seed=0, generation={}) for k in "abc"]
    task: Any = SimpleNamespace(**vars(TASK), conversation=lambda doc_id: doc_id, generation=lambda overrides: None)
    worker = Worker(FakeRunner({"b"}, fails_shared), [task], cells)  # type: ignore[arg-type]
    outcomes = {outcome.cells[0]: outcome for outcome in worker.run(Item("t", (0, 1), ("a", "b", "c")))}
    assert outcomes["b"].failure is not None and outcomes["b"].failure["reason"] == "b cannot"
    assert [r["text"] for r in outcomes["a"].rows + outcomes["c"].rows] == ["a", "a", "c", "c"]
