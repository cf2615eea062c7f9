"""A whole sweep: check everything, answer what is missing, score what is complete, draw the report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtc.app import loading
from vtc.app.preparation import Chat, check_modalities
from vtc.errors import BudgetError
from vtc.eval.catalogue import SweepTask, load_tasks
from vtc.eval.cells import Cell, make_cells, make_methods
from vtc.eval.execute import Item, Worker, missing, plan, run_local
from vtc.eval.failures import failed_alone
from vtc.eval.header import changes_since, check_same_sweep, documents, run_record
from vtc.eval.messages import Clips
from vtc.eval.progress import SilentProgress, default_progress
from vtc.eval.rehearsal import rehearse
from vtc.eval.report import write_report
from vtc.eval.rescoring import score_store
from vtc.eval.results import Results
from vtc.eval.runner import Runner, few_threads
from vtc.eval.settling import SAMPLE, Settler
from vtc.eval.spec import SweepSpec
from vtc.eval.store import Record, Store, Writer, check_writable
from vtc.eval.tracking import check_trackers, track


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind: its folder, the results drawn there, what failed and what was answered in this run."""

    folder: Path
    results: Results
    failures: Sequence[Record]
    answered: int
    seconds: float


def run_sweep(spec: SweepSpec, progress: SilentProgress | None = None) -> SweepResult:
    """Run `spec`, or take it up where an earlier run of it ended; in a notebook with a bar, unless told otherwise.

    Everything that can be refused is refused before the first answer, and before anything is written; a retention that
    a method inside the LLM cannot meet on this model is only noted and left out. An exception of
    a method or of a task's scoring code ends only the cells concerned; it is in `SweepResult.failures`.

    Raises:
        VTCError: an unknown method or task, a method that the model cannot serve, an output folder that cannot be
            written or that belongs to another model.
    """
    progress = progress or default_progress()
    began = time.monotonic()
    make_methods(spec)
    check_trackers(spec.trackers)
    check_writable(spec.folder)
    tasks = load_tasks(spec.tasks, spec.include_path, spec.prompt_profile, spec.data_map)
    first = []
    for task in tasks:
        task.generation(spec.generation)
        first.append(task.probe(Clips(spec.video)))
        rehearse(task, progress.note)
    progress.note(f"loading {spec.model}")
    loaded = loading.load(
        spec.model,
        device=spec.device,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        revision=spec.revision,
    )
    for chat in first:
        check_modalities(loaded, chat)
    runner = Runner(loaded)
    store = Store(spec.folder)
    settler = Settler(runner, _sample(spec, tasks), store.cells() if store.exists else None)
    with few_threads(loaded.model):
        cells = _feasible(make_cells(spec, loaded.fingerprint()), settler, first, progress)
    if store.exists:
        check_same_sweep(store, spec, tasks, cells)
    with store.writing() as writer:
        for note in changes_since(store, spec):
            progress.note(f"note: {note}")
        writer.save_run(run_record(store, spec, tasks, cells, loaded))
        writer.add_cells(cell.record() for cell in cells)
        answered, failures = _answer(spec, tasks, cells, runner, writer, progress)
        for task in tasks:
            failures += score_store(task, documents(spec, task), cells[0].key(), writer, progress)
    results = write_report(spec.folder)
    track(results, spec.trackers, spec.folder)
    return SweepResult(spec.folder, results, failures, answered, time.monotonic() - began)


def _sample(spec: SweepSpec, tasks: Sequence[SweepTask]) -> list[Chat]:
    """The prompts on which budgets in other units than tokens are settled; none where nothing has to be."""
    if spec.budget == "tokens":
        return []
    clips = Clips(spec.video)
    return [task.conversation(i, clips) for task in tasks for i in range(min(SAMPLE, documents(spec, task)))]


def _feasible(cells: Sequence[Cell], settler: Settler, asked: Sequence[Chat], progress: SilentProgress) -> list[Cell]:
    """The cells whose budget can be met on this model and the questions `asked`; the others are noted and left out."""
    kept: list[Cell] = []
    for cell in cells:
        try:
            kept.append(settler.runner.check(settler.settle(cell), asked))
        except BudgetError as error:
            progress.note(f"left out: {error}")
    return kept


def _answer(
    spec: SweepSpec,
    tasks: Sequence[SweepTask],
    cells: Sequence[Cell],
    runner: Runner,
    writer: Writer,
    progress: SilentProgress,
) -> tuple[int, list[Record]]:
    """Fetch the missing answers; return how many were stored, and the failures."""
    wanted = {task.name: range(documents(spec, task)) for task in tasks}
    keys = [cell.key() for cell in cells]
    failed = writer.store.failures()
    items: list[Item] = []
    for task in tasks:
        apart = failed_alone(failed, task.key, ["prepare", "answer"])
        items += plan(task, len(wanted[task.name]), keys, writer.seen, spec.batch_size, apart)
    total = sum(len(wanted[task.name]) * task.repeats * len(keys) for task in tasks)
    left = sum(missing(task, key, wanted[task.name], writer.seen) for task in tasks for key in keys)
    if left < total:
        progress.note(f"{total - left} of {total} answers are stored already")
    if not items:
        return 0, []
    before = len(writer.seen)
    pending = {key for item in items for key in item.cells}
    worker = Worker(runner, tasks, [cell for cell in cells if cell.key() in pending], spec.video)
    with few_threads(runner.model), contextlib.closing(worker), progress:
        progress.start(total, total - left)
        failures = run_local(items, worker, writer, progress)
    return len(writer.seen) - before, failures
