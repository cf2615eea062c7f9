"""`python tests/eval/faults.py` disturbs sweeps at random moments and writes docs/results/faults.md.

A round is a sweep into a fresh folder: runs that are each disturbed in one way, then one that is not. After every run
each row has to be there once and be that of an undisturbed sweep, and none that was there may be missing; after the
last one the tables have to be equal, byte by byte. Runs are forks of one process that has imported everything.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vtc.eval.report
import vtc.eval.scoring
import vtc.eval.workers
from vtc.app.pages import page
from vtc.eval.catalogue import SweepTask
from vtc.eval.columns import NAMES
from vtc.eval.quiet import muted
from vtc.eval.spec import make_spec
from vtc.eval.store import FIELDS, Store, row_key
from vtc.eval.sweep import run_sweep
from vtc.methods.vtc_cls import VTCCLS

PAGE = Path(__file__).parents[2] / "docs" / "results" / "faults.md"
FORK = multiprocessing.get_context("fork")
DOCUMENTS, CELLS = 24, 3
PER_ROUND = 4
GROWTH = DOCUMENTS // PER_ROUND
"""Each run of a round asks about so many documents more, so that all of them find something to do."""

Rows = dict[Any, Any]
Disturb = Callable[[random.Random, Path, int], None]


def sweep(out: Path, limit: int, workers: int) -> int:
    """One run; its exit status is that of the command."""
    spec = {"methods": ["random", "vtc_cls"], "retentions": [0.25], "limit": limit, "batch_size": 4}
    result = run_sweep(make_spec({**spec, "out": out, "workers": workers, "device": "cpu"}))
    return 1 if result.failures else 0


def _run(out: Path, limit: int, workers: int, before: Callable[[], None] | None, log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.setsid()  # so that whatever is left of it can be found
    torch.set_num_threads(1)
    vtc.eval.workers.START_METHOD = "fork"
    if before is not None:
        before()
    sys.exit(sweep(out, limit, workers))


def start(out: Path, limit: int, workers: int = 1, before: Callable[[], None] | None = None) -> Any:
    """A run that has begun; `before` is called in its process first."""
    process = FORK.Process(target=_run, args=(out, limit, workers, before, out.parent / "log"))  # type: ignore[attr-defined]
    process.start()
    return process


def children(of: int) -> list[int]:
    """The processes that a process has started and that live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *_ = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(parent) == of and state != "Z":
            found.append(int(status.parent.name))
    return found


def await_moment(chance: random.Random, process: Any, out: Path, limit: int) -> None:
    """Wait until a run has stored some of its answers, or for some time of a run, whatever it does then."""
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0.1, 1.0) * TYPICAL["seconds"])
        return
    path = out / "rows.jsonl"
    before = path.stat().st_size if path.exists() else 0
    more = chance.uniform(0, 200) * CELLS * GROWTH  # a row takes some 250 bytes
    while process.is_alive() and (path.stat().st_size if path.exists() else 0) <= before + more:
        time.sleep(0.001)


def end(process: Any, left: list[int]) -> None:
    """Wait for a run, and for the workers it may have left when it was killed."""
    process.join()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{each}").exists() for each in left):
        if time.monotonic() > until:
            raise AssertionError(f"workers outlived their driver by 20 s: {left}")
        time.sleep(0.02)


# --- the ways to disturb a run
def kill_driver(chance: random.Random, out: Path, limit: int) -> None:
    """SIGKILL for a driver with one or two workers."""
    process = start(out, limit, chance.choice([1, 2]))
    await_moment(chance, process, out, limit)
    left = children(process.pid)
    process.kill()
    end(process, left)


def kill_worker(chance: random.Random, out: Path, limit: int) -> None:
    """SIGKILL for one of two workers; the run has to go on without a failure."""
    process = start(out, limit, 2)
    await_moment(chance, process, out, limit)
    for victim in chance.sample(workers := children(process.pid), min(1, len(workers))):
        os.kill(victim, signal.SIGKILL)
    process.join()
    assert process.exitcode == 0, f"a lost worker ended the run with {process.exitcode}"


def fill_disk(chance: random.Random, out: Path, limit: int) -> None:
    """No file may grow beyond what some file has and a little more; the system refuses as a full disk does."""
    sizes = [path.stat().st_size for path in out.glob("*.jsonl")]
    room = max(sizes, default=0) + chance.randrange(1, 4000)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    start(out, limit, 1, limited).join()


def refuse_writing(chance: random.Random, out: Path, limit: int) -> None:
    """ENOSPC at a random write, with a part of what was to be written on the disk."""
    left = chance.randrange(1, 8)

    def patched() -> None:
        import vtc.eval.store as store

        whole = store._write_all
        count = iter(range(left, -1, -1))

        def some(file: Any, content: bytes) -> None:
            if next(count, 0):
                return whole(file, content)
            file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        store._write_all = some

    process = start(out, limit, 1, patched)
    process.join()


def leave_half_a_line(chance: random.Random, out: Path, limit: int) -> None:
    """A file ends in the middle of a line, as after a power cut."""
    start_with = [path for name in FIELDS if (path := out / f"{name}.jsonl").exists() and path.stat().st_size]
    if start_with:
        path = chance.choice(start_with)
        line = path.read_bytes().splitlines(keepends=True)[-1]
        with path.open("ab") as file:
            file.write(line[: chance.randrange(1, len(line) - 1)])


def break_document(chance: random.Random, out: Path, limit: int) -> None:
    """A document that cannot be read, by one or two workers."""
    lost = chance.randrange(limit - GROWTH, limit)

    def patched() -> None:
        whole = SweepTask.conversation

        def some(self: SweepTask, doc_id: int, *more: Any) -> Any:
            if doc_id == lost:
                raise OSError("picture is broken")
            return whole(self, doc_id, *more)

        SweepTask.conversation = some  # type: ignore[method-assign]

    start(out, limit, chance.choice([1, 2]), patched).join()


def break_method(chance: random.Random, out: Path, limit: int) -> None:
    """A method that raises from some batch on."""
    left = chance.randrange(0, 2)

    def patched() -> None:
        whole, count = VTCCLS.score, iter(range(left))

        def some(self: Any, view: Any) -> Any:
            if next(count, None) is None:
                raise ZeroDivisionError("attention of an empty row")
            return whole(self, view)

        VTCCLS.score = some  # type: ignore[method-assign]

    start(out, limit, chance.choice([1, 2]), patched).join()


def break_scoring(chance: random.Random, out: Path, limit: int) -> None:
    """Scoring that raises for some cells."""
    bad = chance.randrange(0, CELLS)

    def patched() -> None:
        whole, count = vtc.eval.scoring.score, iter(range(CELLS))

        def some(*given: Any) -> Any:
            if next(count, None) == bad:
                raise RuntimeError("no judge")
            return whole(*given)

        vtc.eval.scoring.score = some

    start(out, limit, 1, patched).join()


FAULTS: dict[str, Disturb] = {
    "driver killed": kill_driver,
    "worker killed": kill_worker,
    "file size limit": fill_disk,
    "disk full in the middle of a write": refuse_writing,
    "half a last line": leave_half_a_line,
    "document that cannot be read": break_document,
    "method that raises": break_method,
    "scoring that raises": break_scoring,
}
TYPICAL = {"seconds": 3.0}
"""How long an undisturbed run takes."""


def rows(out: Path) -> Rows:
    """The complete rows of a store without timings, each asserted to be there once."""
    path = out / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    by_key = {row_key(row): {k: v for k, v in row.items() if not k.endswith("seconds")} for row in found}
    assert len(by_key) == len(found), f"{len(found) - len(by_key)} rows are doubled"
    return by_key


def disturb(count: int, seed: int, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Disturb `count` runs; how often in each way, and how often answers were missing afterwards."""
    chance = random.Random(seed)
    whole = folder / "whole"
    began = time.monotonic()
    undisturbed = start(whole, DOCUMENTS)
    undisturbed.join()
    assert undisturbed.exitcode == 0, (folder / "log").read_text()
    TYPICAL["seconds"] = time.monotonic() - began
    wanted, table = rows(whole), (whole / "metrics.csv").read_bytes()
    assert len(wanted) == DOCUMENTS * CELLS and table.startswith(",".join(NAMES[:3]).encode())
    kinds = [list(FAULTS)[number % len(FAULTS)] for number in range(count)]
    chance.shuffle(kinds)
    done: Counter[str] = Counter()
    early: Counter[str] = Counter()
    for first in range(0, count, PER_ROUND):
        out = folder / f"round{first}"
        had: Rows = {}
        for number, kind in enumerate(kinds[first : first + PER_ROUND], start=1):
            limit = GROWTH * number
            FAULTS[kind](chance, out, limit)
            early[kind] += len(rows(out)) < limit * CELLS
            done[kind] += 1
            now = rows(out)
            assert had.items() <= now.items(), f"{kind}: rows were lost"
            assert now.items() <= wanted.items(), f"{kind}: rows differ"
            had = now
            sys.stderr.write(f"{sum(done.values())} of {count}: {kind}, {len(had)} of {len(wanted)} rows\n")
        last = start(out, DOCUMENTS)
        last.join()
        assert last.exitcode == 0, (folder / "log").read_text()[-3000:]
        assert rows(out) == wanted and list(Store(out).rows()), "the last run did not complete the sweep"
        assert (out / "metrics.csv").read_bytes() == table, "the tables differ"
        shutil.rmtree(out)
    return done, early


def main() -> None:
    """Disturb and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    with muted():
        import datasets  # noqa: F401  # before the forks
        import transformers  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        done, early = disturb(given.faults, given.seed, Path(folder))
    words = (
        f"{given.faults} disturbed runs of a sweep of {CELLS} cells x {DOCUMENTS} questions, {PER_ROUND} to a folder, "
        "then one that is left in peace, with seed "
        f"{given.seed}. After each of them no row was lost, doubled or other than in an undisturbed sweep; in the end "
        "metrics.csv was equal byte by byte. The last column counts those after which answers were missing."
    )
    table = (["fault", "times", "answers missing"], [[kind, str(done[kind]), str(early[kind])] for kind in FAULTS])
    given.out.write_text(page("Faults", "python tests/eval/faults.py", words, table, packages=("torch", "lmms-eval")))


if __name__ == "__main__":
    main()
