"""Several workers: one loop for all kinds, workers that are lost, and work that takes workers with it."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vtc.errors import InputError, VTCError
from vtc.eval import workers
from vtc.eval.answering import Outcome
from vtc.eval.execute import PATIENCE, TRIES, Ended, Here, run_items
from vtc.eval.facts import Facts, Settled
from vtc.eval.failures import TaskKey, failure_record
from vtc.eval.plan import Item, plan
from vtc.eval.progress import SilentProgress
from vtc.eval.spec import make_spec
from vtc.eval.station import Order, Refused
from vtc.eval.store import Store, row_key
from vtc.eval.sweep import SweepResult, run_sweep
from vtc.eval.workers import STARTS, Crew, Gone, _devices
from vtc.method.base import Compressor

WriteTask = Callable[..., Path]
TASK: Any = SimpleNamespace(name="t", fingerprint="f", repeats=1, key=TaskKey("t", "f"))
WITH_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is an extra")
"""Found, not imported: an engine says how before it imports Ray."""
FACTS = Facts("m", "cpu", {}, {"t": "f"}, {"a": Settled(None, 0.5, 0.5)}, ())


class Notes(SilentProgress):
    """Keeps what the user would read, and adds up what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.answers = self.lost = 0

    def note(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, count: int, status: str = "") -> None:
        self.answers += count

    def fail(self, failure: dict[str, Any], lost: int) -> None:
        self.lost += lost


class FakeLink:
    """A process that has said everything as soon as it is asked."""

    def __init__(self, engine: FakeEngine, first: Any) -> None:
        self.engine, self.said = engine, deque([first])
        self.ended = False

    def give(self, item: Item, following: Item | None) -> None:
        self.engine.given.append(item)
        self.engine.announced.append(following)
        self.said += self.engine.answers(item)

    def receive(self) -> Any:
        said = self.said.popleft()
        if isinstance(said, Gone):
            raise said
        return said

    def end(self) -> None:
        self.ended = True


class FakeEngine:
    """Processes that die at what `deadly` says and raise at what `fails` says; `first` is what each says first."""

    def __init__(
        self,
        deadly: set[tuple[str, int]] = frozenset(),  # type: ignore[assignment]
        fails: set[tuple[str, int]] = frozenset(),  # type: ignore[assignment]
        first: Sequence[Any] = (),
        chance: Sequence[int] = (),
    ) -> None:
        self.deadly, self.fails, self.first, self.chance = deadly, fails, deque(first), set(chance)
        self.links: list[FakeLink] = []
        self.known: list[Any] = []
        self.given: list[Item] = []
        self.announced: list[Item | None] = []
        self.closed = False

    def start(self, worker: int, known: Any) -> FakeLink:
        self.known.append(known)
        self.links.append(FakeLink(self, self.first.popleft() if self.first else FACTS))
        return self.links[-1]

    def ready(self, links: Sequence[Any]) -> Sequence[Any]:
        return [next(link for link in reversed(links) if link.said)]

    def close(self) -> None:
        self.closed = True

    def answers(self, item: Item) -> list[Any]:
        said: list[Any] = []
        for cell in item.cells:
            pairs = {(cell, doc_id) for doc_id in item.doc_ids}
            if pairs & self.deadly or (len(self.given) in self.chance and cell == item.cells[-1]):
                return [*said, Gone("killed by SIGKILL")]
            if pairs & self.fails:
                failure = failure_record("answer", TASK.key, (cell,), item.doc_ids, ValueError("no"))
                said.append(Outcome((cell,), failure=failure))
                continue
            rows = [
                {"cell": cell, "task": "t", "task_fp": "f", "repeat": 0, "doc_id": doc_id, "text": f"{cell}{doc_id}"}
                for doc_id in item.doc_ids
            ]
            said.append(Outcome((cell,), rows=tuple(rows)))
        return [*said, Ended()]


class Alone:
    """The worker of `Here`, which answers as the fake processes do."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine

    def run(self, item: Item, following: Item | None = None) -> Any:
        self.engine.given.append(item)
        return (said for said in self.engine.answers(item) if isinstance(said, Outcome))


def run(folder: Path, engine: FakeEngine, workers: int = 2, documents: int = 10, block: int = 4) -> tuple[Any, Notes]:
    """Run cells a, b and c; workers=0: in this process."""
    store, notes = Store(folder), Notes()
    with store.writing() as writer, Crew(engine, max(1, workers), notes) as crew:
        writer.save_run({"model": {}, "tasks": {}, "sweeps": []})
        items = list(plan(TASK, documents, ["a", "b", "c"], writer.seen, block))
        pool: Any = crew if workers else Here(Alone(engine))  # type: ignore[arg-type]
        failures = run_items(items, {"t": TASK}, pool, writer, notes)
    assert engine.closed and all(link.ended for link in engine.links)
    keys = [row_key(row) for row in store.rows()]
    assert len(set(keys)) == len(keys)
    return failures, notes


def texts(folder: Path) -> list[str]:
    return sorted(row["text"] for row in Store(folder).rows())


EVERYTHING = sorted(f"{cell}{doc_id}" for cell in "abc" for doc_id in range(10))


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_the_same_answers_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    engine = FakeEngine()
    failures, notes = run(tmp_path, engine, workers)
    assert not failures and texts(tmp_path) == EVERYTHING and notes.answers == 30 and not notes.lines
    assert len(engine.links) == min(workers, 3), "no more processes than there are items"
    assert sorted(item.doc_ids for item in engine.given) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    if workers == 1:
        assert engine.announced == [*engine.given[1:], None], "a worker knows what to read ahead"


@pytest.mark.parametrize("workers", [0, 2])
def test_cells_that_fail_are_given_up_alike(tmp_path: Path, workers: int) -> None:
    failures, notes = run(tmp_path, FakeEngine(fails={("b", 1)}), workers)
    assert [(f["cells"], f["doc_ids"]) for f in failures] == [(["b"], [0, 1, 2, 3])]
    assert {text for text in texts(tmp_path) if "b" not in text} == {t for t in EVERYTHING if "b" not in t}
    assert notes.answers + notes.lost == 30
    failures, _ = run(tmp_path / "alone", FakeEngine(fails={("b", n) for n in range(30)}), workers, 30, 1)
    assert [len(f["doc_ids"]) for f in failures] == [1] * PATIENCE


def test_a_lost_worker_costs_nothing(tmp_path: Path) -> None:
    engine = FakeEngine(chance=[1, 3])
    failures, notes = run(tmp_path, engine)
    assert not failures and texts(tmp_path) == EVERYTHING and notes.answers == 30
    assert len(engine.links) > 2
    assert all(line.startswith("note: a worker was lost (killed by SIGKILL) at t, documents ") for line in notes.lines)
    again = [item for item in engine.given if item.cells == ("c",)]
    assert again and all(len(item.doc_ids) > 1 for item in again), "only what lacked is asked again, in its block"


def test_a_document_that_kills_while_it_is_prepared_is_lost_alone(tmp_path: Path) -> None:
    engine = FakeEngine(deadly={("a", 5)})
    failures, notes = run(tmp_path, engine)
    (failure,) = failures
    assert (failure["stage"], failure["doc_ids"], failure["cells"]) == ("prepare", [5], ["a", "b", "c"])
    assert failure["error"] == "WorkerLost" and "2 workers in a row" in failure["reason"]
    assert texts(tmp_path) == [text for text in EVERYTHING if text[1] != "5"]
    assert (notes.answers, notes.lost) == (27, 3)
    assert len(engine.links) <= 2 + 2 * TRIES


def test_a_document_that_kills_one_cell_is_lost_to_that_cell(tmp_path: Path) -> None:
    engine = FakeEngine(deadly={("b", 5)})
    failures, notes = run(tmp_path, engine)
    (failure,) = failures
    assert (failure["stage"], failure["doc_ids"], failure["cells"]) == ("answer", [5], ["b"])
    assert texts(tmp_path) == [text for text in EVERYTHING if text != "b5"]
    assert (notes.answers, notes.lost) == (29, 1)
    assert Item("t", (4, 5, 6, 7), ("c",)) in engine.given, "other cells answer the whole block"


def test_a_cell_that_always_kills_is_given_up(tmp_path: Path) -> None:
    engine = FakeEngine(deadly={("b", n) for n in range(40)})
    failures, notes = run(tmp_path, engine, documents=40)
    assert [(f["cells"], len(f["doc_ids"])) for f in failures] == [(["b"], 1)] * PATIENCE
    assert len(texts(tmp_path)) == 80 and (notes.answers, notes.lost) == (80, 40)


def test_a_failed_device_makes_a_new_process_and_ends_a_single_one(tmp_path: Path) -> None:
    broken = failure_record("answer", TASK.key, ("a",), (0,), RuntimeError("CUDA error: device-side assert"))

    class Broken(FakeEngine):
        def answers(self, item: Item) -> list[Any]:
            if len(self.given) == 1:
                return [Ended(lost="CUDA error: device-side assert")]
            return super().answers(item)

    engine = Broken()
    failures, _ = run(tmp_path, engine, workers=1)
    assert not failures and texts(tmp_path) == EVERYTHING and len(engine.links) == 2

    worker: Any = SimpleNamespace(run=lambda item, following=None: iter([Outcome(("a",), failure=broken)]))
    here = Here(worker)
    here.give(0, Item("t", (0,), ("a",)), None)
    with pytest.raises(VTCError, match="the same command goes on from there"):
        here.wait()


def test_what_one_process_measured_the_others_are_told() -> None:
    engine = FakeEngine()
    with Crew(engine, 2, Notes()) as crew:
        assert crew.facts() == FACTS
        crew.give(1, Item("t", (0,), ("a",)), None)
    assert engine.known == [{}, {"a": {"asked": "a", "setting": 0.5, "achieved": 0.5}}]


def test_processes_that_never_begin_end_the_sweep(tmp_path: Path) -> None:
    engine = FakeEngine(first=[Gone("killed by SIGKILL")] * STARTS)
    with pytest.raises(VTCError, match=r"3 worker processes in a row.*SIGKILL.*fewer --workers"):
        run(tmp_path, engine, workers=1)
    failures, notes = run(tmp_path, FakeEngine(first=[Gone("killed by SIGKILL")] * (STARTS - 1)), workers=1)
    assert not failures and texts(tmp_path) == EVERYTHING and "it is started again" in notes.lines[0]
    with pytest.raises(InputError, match="no such model"):
        run(tmp_path / "b", FakeEngine(first=[Refused(InputError, "no such model")]))
    other = Facts("m", "cpu", {}, {"t": "g"}, FACTS.settled, ())
    with pytest.raises(InputError, match=r"worker . found another model or other tasks"):
        run(tmp_path / "c", FakeEngine(first=[FACTS, other]))


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(present: int, **settings: Any) -> list[str | None]:
        spec = make_spec(settings)
        return [_devices(spec, worker, present) for worker in range(spec.workers)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shares(0, workers=2) == [None, None]
    assert shares(4, workers=2, device="cpu") == [None, None]
    assert shares(4, workers=3) == ["0", "1", "2"]
    assert shares(4, workers=2, gpus_per_worker=2, device="balanced") == ["0,1", "2,3"]
    assert shares(2, workers=4, gpus_per_worker=0.5) == ["0", "0", "1", "1"]
    assert shares(2, workers=4, gpus_per_worker=0) == [None] * 4
    assert shares(2, workers=1, gpus_per_worker=1, device="balanced") == ["0"]
    refused = "--workers 3 with --gpus-per-worker 1 need 3 GPUs, and this machine has 2; .*--gpus-per-worker 0.66 to"
    with pytest.raises(InputError, match=refused):
        shares(2, workers=3)
    assert len(shares(2, workers=3, gpus_per_worker=0.66)) == 3  # what it says to write instead is taken
    for number in (1, 2):
        with pytest.raises(InputError, match="this machine has 0; give no --gpus-per-worker"):
            shares(0, workers=number, gpus_per_worker=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert shares(2, workers=2) == ["5", "7"]


def test_both_engines_share_out_by_one_rule() -> None:
    from vtc.eval.cluster import RayEngine

    def of_cluster(gpus: float, **settings: Any) -> tuple[int, float]:
        engine = object.__new__(RayEngine)
        engine._ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": gpus})
        return engine._shares(make_spec({"engine": "ray", **settings}))

    assert of_cluster(2, workers=4, gpus_per_worker=0.5) == (2, 0.5)
    assert [of_cluster(2, workers=2)[1], of_cluster(0, workers=2)[1], of_cluster(2, device="cuda:1")[1]] == [1, 0, 0]
    for gpus, words in ((2.0, "has 2; .*0.66 to share"), (0.0, "has 0; give no --gpus")):
        with pytest.raises(InputError, match=f"--workers 3 with --gpus-per-worker 1 need 3 GPUs, .* cluster {words}"):
            of_cluster(gpus, workers=3, gpus_per_worker=1)
    with pytest.raises(InputError, match="--workers 9 need a CPU core each, and this cluster has 8"):
        of_cluster(0, workers=9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpus_per_worker": 1, "device": "cpu"}, "gpus_per_worker 1 shares out GPUs, and device 'cpu'"),
        ({"gpus_per_worker": 1.5}, "gpus_per_worker 1.5 is no whole number of GPUs"),
        ({"gpus_per_worker": float("inf")}, "finite number"),
    ],
)
def test_gpus_that_cannot_be_shared_out_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_spec(settings)


def test_a_single_worker_heeds_gpus_per_worker(sweep: Callable[..., SweepResult], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="this machine has 0"):
        sweep("gpu", device="auto", workers=1, gpus_per_worker=1)


def test_what_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.eval.cluster import RayEngine

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'visual-token-compression\[cluster\]'"):
        RayEngine(make_spec({"engine": "ray"}), {})
    with pytest.raises(InputError, match="write engine: ray beside it"):
        make_spec({"address": "auto"})

    class Local(Compressor):
        name = "local_class"

        def plan(self, spec: Any) -> Any:
            raise NotImplementedError

        select = plan

    with pytest.raises(InputError, match="register its class in a file named under plugins"):
        Order.of(make_spec({"methods": [Local()]}), 1, {})


# --- real processes
@pytest.fixture
def sweep(model_folder: Path, tmp_path: Path, write_task: WriteTask) -> Callable[..., SweepResult]:
    """A function that sweeps 24 documents with three cells."""
    folder = write_task(tmp_path / "tasks", documents=24)

    def go(out: str, **settings: Any) -> SweepResult:
        defaults = {
            "model": str(model_folder), "methods": ["random", "vtc_cls"], "retentions": [0.1], "tasks": ["blobs"],
            "include_path": [folder], "batch_size": 3, "out": tmp_path / out,
        }  # fmt: skip
        return run_sweep(make_spec(defaults | settings))

    return go


def rows(folder: Path) -> dict[Any, dict[str, Any]]:
    """All rows by key without their timings."""
    found = list(Store(folder).rows())
    by_key = {row_key(r): {k: v for k, v in r.items() if not k.endswith("seconds")} for r in found}
    assert len(by_key) == len(found)
    return by_key


def test_two_processes_answer_like_one(sweep: Callable[..., SweepResult]) -> None:
    one, two = sweep("one"), sweep("two", workers=2)
    assert rows(one.folder) == rows(two.folder) and len(rows(one.folder)) == 72
    assert (one.folder / "metrics.csv").read_bytes() == (two.folder / "metrics.csv").read_bytes()


DEADLY = """

def deadly(doc):
    import os, signal
    if doc["scene"] == 4 and os.getpid() != {driver}:
        os.kill(os.getpid(), signal.SIGKILL)
    return doc_to_visual(doc)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=WITH_RAY)])
def test_processes_that_a_document_kills_answer_all_others_like_one(
    sweep: Callable[..., SweepResult],
    write_task: WriteTask,
    tmp_path: Path,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Document 8 has a block of its own; how one is found among others, the fakes show.

    Processes of this machine are forks of one that has imported everything, those of the tests around are not.
    """
    monkeypatch.setattr(workers, "START_METHOD", "forkserver")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vtc.eval.station", "lmms_eval.tasks"])
    folder = write_task(tmp_path / "deadly", documents=9, visual="deadly")
    with (folder / "utils.py").open("a") as file:
        file.write(DEADLY.format(driver=os.getpid()))
    settings: dict[str, Any] = {"include_path": [folder], "batch_size": 4}
    one, result = sweep("one", **settings), sweep(engine, **settings, engine=engine, workers=2)
    assert sorted((f["stage"], f["doc_ids"]) for f in result.failures) == [("prepare", [8])]
    assert rows(result.folder) == {key: row for key, row in rows(one.folder).items() if key[3] != 8}
    assert [line["n"] for line in result.results.lines if line["metric"] == "accuracy"] == [8, 8, 8]


@pytest.mark.slow
def test_an_interrupt_ends_the_workers(tmp_path: Path, model_folder: Path, write_task: WriteTask) -> None:
    folder = write_task(tmp_path / "tasks", documents=400)
    command = [
        sys.executable, "-m", "vtc", "sweep", "--model", str(model_folder), "--methods", "random",
        "--retentions", "0.1", "--tasks", "blobs", "--include-path", str(folder), "--batch-size", "1",
        "--out", str(tmp_path / "out"), "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    stored = tmp_path / "out" / "rows.jsonl"
    while process.poll() is None and not stored.exists():
        time.sleep(0.05)
    children = _children(process.pid)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in said, said
    assert len(children) >= 2
    until = time.monotonic() + 10
    while any(map(_lives, children)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(_lives, children))


ENDING = """
import atexit, multiprocessing, os, signal, types
from vtc.eval import workers


@atexit.register
def last():
    os.kill(os.getpid(), signal.SIGTERM)
    os.write(2, b"left")


ours, theirs = multiprocessing.Pipe()
ours.close()
workers._end_with_parent = lambda: None
workers.Remote = lambda order: types.SimpleNamespace(begin=lambda: iter(()), run=None)
workers._main(theirs, None, None)
"""


def test_a_process_that_is_ending_is_not_interrupted() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "left")


def _lives(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def _children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(status.parent.name))
    return found
