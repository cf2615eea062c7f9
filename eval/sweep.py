"""A whole sweep: check everything, answer what is missing, score what is complete, draw the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtc.app import loading
from vtc.errors import BudgetError
from vtc.eval.catalogue import SweepTask, load_tasks, root_cause
from vtc.eval.cells import Cell, make_cells, make_methods
from vtc.eval.execute import Item, Worker, missing, plan, run_local
from vtc.eval.failures import FAULTS, failed_alone, failure_record, unanswered
from vtc.eval.header import changes_since, check_same_sweep, documents, run_record
from vtc.eval.progress import SilentProgress
from vtc.eval.rehearsal import rehearse
from vtc.eval.report import write_report
from vtc.eval.results import Results
from vtc.eval.runner import Runner, few_threads
from vtc.eval.scoring import Scored, metric_records
from vtc.eval.spec import SweepSpec
from vtc.eval.store import Record, Store, Writer, check_writable


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind: its folder, the results drawn there, what failed and what was answered in this run."""

    folder: Path
    results: Results
    failures: Sequence[Record]
    answered: int
    seconds: float


def run_sweep(spec: SweepSpec, progress: SilentProgress | None = None) -> SweepResult:
    """Run `spec`, or take it up where an earlier run of it ended.

    Everything that can be refused is refused before the first answer, and before anything is written; a retention that
    a method inside the LLM cannot meet on this model is only noted and left out. An exception of
    a method or of a task's scoring code ends only the cells concerned; it is in `SweepResult.failures`.

    Raises:
        VTCError: an unknown method or task, a method that the model cannot serve, an output folder that cannot be
            written or that belongs to another model.
    """
    progress = progress or SilentProgress()
    began = time.monotonic()
    make_methods(spec)
    check_writable(spec.folder)
    tasks = load_tasks(spec.tasks, spec.include_path, spec.prompt_profile)
    for task in tasks:
        task.generation(spec.generation)
        task.probe()
        rehearse(task, progress.note)
    progress.note(f"loading {spec.model}")
    loaded = loading.load(
        spec.model,
        device=spec.device,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        revision=spec.revision,
    )
    runner = Runner(loaded)
    cells = _feasible(make_cells(spec, loaded.fingerprint()), runner, progress)
    store = Store(spec.folder)
    if store.exists:
        check_same_sweep(store, spec, tasks, cells)
    with store.writing() as writer:
        for note in changes_since(store, spec):
            progress.note(f"note: {note}")
        writer.save_run(run_record(store, spec, tasks, cells, loaded))
        writer.add_cells(cell.record() for cell in cells)
        answered, failures = _answer(spec, tasks, cells, runner, writer, progress)
        for task in tasks:
            failures += _score(task, documents(spec, task), cells[0].key(), writer, progress)
    return SweepResult(spec.folder, write_report(spec.folder), failures, answered, time.monotonic() - began)


def _feasible(cells: Sequence[Cell], runner: Runner, progress: SilentProgress) -> list[Cell]:
    """The cells whose retention their method can meet on this model; the others are noted and left out."""
    kept: list[Cell] = []
    for cell in cells:
        try:
            kept.append(runner.check(cell))
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
    worker = Worker(runner, tasks, [cell for cell in cells if cell.key() in pending])
    with few_threads(runner.model), progress:
        progress.start(total, total - left)
        failures = run_local(items, worker, writer, progress)
    return len(writer.seen) - before, failures


def _score(task: SweepTask, n: int, baseline: str, writer: Writer, progress: SilentProgress) -> list[Record]:
    """Score the store's cells that are complete on the first `n` documents and not scored there yet.

    A cell that was scored while the baseline was incomplete is scored again, to be compared with it. Documents that
    cannot be prepared, and so lack in every cell, are left out for all of them alike.
    """
    left_out = unanswered(writer.store.failures(), task.key, n, writer.seen)
    doc_ids = [doc_id for doc_id in range(n) if doc_id not in left_out]
    scored_before: dict[str, bool] = {}  # cell -> compared with the baseline
    for record in writer.store.metrics():
        about = record["task"], record["task_fp"], record["documents"], record["left_out"]
        if about == (task.name, task.fingerprint, n, sorted(left_out)):
            scored_before[record["cell"]] = scored_before.get(record["cell"], False) or record["paired"] is not None
    complete = [key for key in writer.store.cells() if doc_ids and not missing(task, key, doc_ids, writer.seen)]
    comparable = baseline in complete
    todo = [
        key
        for key in complete
        if key not in scored_before or (comparable and key != baseline and not scored_before[key])
    ]
    if not todo:
        return []
    if comparable:
        todo = [baseline, *(key for key in todo if key != baseline)]
    rows: dict[str, list[Record]] = {key: [] for key in todo}
    for row in writer.store.rows():
        same_task = row["task"] == task.name and row["task_fp"] == task.fingerprint
        if same_task and row["cell"] in rows and row["doc_id"] < n:
            rows[row["cell"]].append({**row, "doc_id": doc_ids.index(row["doc_id"])} if left_out else row)
    scoring = task.only(doc_ids) if left_out else task
    failures: list[Record] = []
    reference: dict[str, Scored] | None = None
    for key in todo:
        try:
            scored, records = metric_records(scoring, key, len(doc_ids), rows[key], reference, writer.store.folder)
        except FAULTS as error:
            failures.append(failure_record("score", task.key, (key,), (), root_cause(error)))
            writer.add_failure(failures[-1])
            progress.fail(failures[-1], 0)
            continue
        for record in records:
            if record["scores"] is not None:
                record["scores"] = {str(doc_ids[int(number)]): value for number, value in record["scores"].items()}
            record |= {"documents": n, "left_out": sorted(left_out)}
        writer.add_metrics(records)
        if key == baseline:
            reference = scored
    return failures
