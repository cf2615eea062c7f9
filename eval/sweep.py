"""A whole sweep: check everything, answer what is missing, score what is complete, draw the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vtc.app.preparation import Chat
from vtc.errors import BudgetError, InputError
from vtc.eval import files
from vtc.eval.asked import Scorable
from vtc.eval.catalogue import SweepTask, load_tasks
from vtc.eval.cells import Cell, make_methods, of_tokens
from vtc.eval.cluster import RayEngine
from vtc.eval.execute import Here, Pool, run_items
from vtc.eval.facts import Facts
from vtc.eval.failures import failed_alone
from vtc.eval.header import changes_since, check_same_sweep, documents, run_record
from vtc.eval.messages import Clips
from vtc.eval.plan import Item, missing, plan
from vtc.eval.progress import SilentProgress, default_progress
from vtc.eval.rehearsal import rehearse
from vtc.eval.report import write_report
from vtc.eval.rescoring import score_store
from vtc.eval.results import Results
from vtc.eval.samples import write_samples
from vtc.eval.spec import SweepSpec
from vtc.eval.station import Station
from vtc.eval.store import Record, Store, Writer, check_writable
from vtc.eval.tracking import check_trackers, track
from vtc.eval.workers import Crew, LocalEngine

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind: its folder, the results drawn there, what failed and what was answered in this run."""

    folder: Path
    results: Results
    failures: Sequence[Record]
    answered: int
    seconds: float

    @property
    def frame(self) -> pd.DataFrame:
        """The lines of `metrics.csv` as a data frame, one metric of one cell each."""
        return files.frame(self.results)


def run_sweep(spec: SweepSpec, progress: SilentProgress | None = None) -> SweepResult:
    """Run `spec`, or take it up where an earlier run of it ended; in a notebook with a bar, unless told otherwise.

    Everything that can be refused is refused before the first answer, and before anything is written; a retention that
    a method cannot meet on this model, or on a task, is only noted and left out there. An exception of
    a method or of a task's scoring code ends only the cells concerned; it is in `SweepResult.failures`.

    Raises:
        VTCError: an unknown method or task, a method that the model cannot serve, an output folder that cannot be
            written or that belongs to another model.
    """
    progress = progress or default_progress()
    began = time.monotonic()
    make_methods(spec)
    if unmoved := of_tokens(spec):
        progress.note(f"note: budget {spec.budget!r} is not about {', '.join(unmoved)}, which stay numbers of tokens")
    check_trackers(spec.trackers)
    check_writable(spec.folder)
    tasks = load_tasks(spec.tasks, spec.include_path, spec.prompt_profile, spec.data_map)
    first = []
    for task in tasks:
        task.generation(spec.generation)
        first.append(task.probe(Clips(spec.video)))
        rehearse(task, progress.note)
    progress.note(f"loading {spec.model}")
    store = Store(spec.folder)
    known = {key: cell for key, cell in store.cells().items() if cell.get("asked")} if store.exists else {}
    with _workers(spec, tasks, first, known, progress) as (facts, pool):
        for reason in facts.left_out:
            progress.note(f"left out: {reason}")
        cells = facts.cells(spec)
        if facts.left_out and len(cells) == 1:
            raise BudgetError(
                f"no method of this sweep can meet its budget, the first of them because {facts.left_out[0]}; or write"
                " methods: [none] for the untouched model alone"
            )
        by_task = {task.name: facts.cells(spec, task.name) for task in tasks}
        if store.exists:
            check_same_sweep(store, spec, tasks, cells)
        with store.writing() as writer:
            for note in changes_since(store, spec):
                progress.note(f"note: {note}")
            writer.save_run(run_record(store, spec, tasks, by_task, facts))
            writer.add_cells(cell.record() for cell in cells)
            answered, failures = answer_missing(spec, tasks, by_task, pool, writer, progress)
            for task in tasks:
                failures += score_store(task, documents(spec, task), cells[0].key(), writer, progress)
            write_samples(store, tasks, spec.video)
    results = write_report(spec.folder)
    track(results, spec.trackers, spec.folder)
    return SweepResult(spec.folder, results, failures, answered, time.monotonic() - began)


@contextlib.contextmanager
def _workers(
    spec: SweepSpec,
    tasks: Sequence[SweepTask],
    asked: Sequence[Chat],
    known: Mapping[str, Record],
    progress: SilentProgress,
) -> Iterator[tuple[Facts, Pool]]:
    """The workers that `spec` asks for, and what they know of the model."""
    if spec.engine == "local" and spec.workers == 1 and not spec.gpus_per_worker:  # which others alone can be shown
        with Station(spec, tasks, asked, known) as station:
            yield station.facts, Here(station.worker)
        return
    engine = RayEngine(spec, known) if spec.engine == "ray" else LocalEngine(spec, known)
    with Crew(engine, spec.workers, progress) as crew:
        facts = crew.facts()
        if dict(facts.tasks) != {task.name: task.fingerprint for task in tasks}:
            raise InputError(
                "the workers found other tasks, or another version of them, than this process; all machines of a sweep"
                " need the same task folders under the same paths"
            )
        yield facts, crew


def answer_missing(
    spec: SweepSpec,
    tasks: Sequence[Scorable],
    cells: Mapping[str, Sequence[Cell]],
    pool: Pool,
    writer: Writer,
    progress: SilentProgress,
) -> tuple[int, list[Record]]:
    """Fetch the missing answers of each task's cells; return how many were stored, and the failures."""
    wanted = {task.name: range(documents(spec, task)) for task in tasks}
    keys = {task: [cell.key() for cell in each] for task, each in cells.items()}
    failed = writer.store.failures()
    items: list[Item] = []
    for task in tasks:
        apart = failed_alone(failed, task.key, ["prepare", "answer"])
        items += plan(task, len(wanted[task.name]), keys[task.name], writer.seen, spec.batch_size, apart)
    total = sum(len(wanted[task.name]) * task.repeats * len(keys[task.name]) for task in tasks)
    left = sum(missing(task, key, wanted[task.name], writer.seen) for task in tasks for key in keys[task.name])
    if left < total:
        progress.note(f"{total - left} of {total} answers are stored already")
    if not items:
        return 0, []
    before = len(writer.seen)
    with progress:
        progress.start(total, total - left)
        failures = run_items(items, {task.name: task for task in tasks}, pool, writer, progress)
    return len(writer.seen) - before, failures
