"""Metrics are derived from stored answers: computed where they lack, or where another scoring computed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.errors import InputError, UnknownName
from vtc.eval.asked import Scorable
from vtc.eval.catalogue import load_tasks, root_cause
from vtc.eval.cells import BASELINE
from vtc.eval.columns import scoring_text
from vtc.eval.failures import FAULTS, failure_record, unanswered
from vtc.eval.plan import missing
from vtc.eval.progress import SilentProgress
from vtc.eval.scoring import Scored, metric_records, scoring_of
from vtc.eval.store import Record, Store, Writer


def rescore(
    folder: Path,
    include_path: Sequence[Path] = (),
    progress: SilentProgress | None = None,
    data_map: Path | Mapping[str, Any] | None = None,
) -> list[Record]:
    """Compute all metrics of a store again from its answers, without a model; returns the failures of tasks' code.

    Each task is scored over the documents of the last sweep that asked about it. `include_path`: folders of tasks, in
    front of those that the sweeps named. `data_map`: instead of the last one that a sweep named.

    Raises:
        VTCError: the folder holds no sweep of tasks or is being written, or a task is not found or not what it was.
    """
    progress = progress or SilentProgress()
    store = Store(folder)
    run = store.run()
    if "encoder" in run["sweeps"][-1]["spec"]:
        raise InputError(
            f"{str(folder)!r} holds a run of `vtc encoders`, whose metrics need its pictures; delete its metrics.jsonl "
            "and give the same `vtc encoders` command again, which encodes no picture anew"
        )
    named = [Path(path) for sweep in run["sweeps"] for path in sweep["spec"].get("include_path", ())]
    folders = [*include_path, *(path for path in dict.fromkeys(named) if path.is_dir())]
    data_map = data_map or _data_map(run)
    tasks = []
    for name, settings in run["tasks"].items():
        try:
            (task,) = load_tasks([name], folders, settings.get("prompt_profile", "default"), data_map)
        except UnknownName as error:
            raise UnknownName(f"{error}; give the folder that holds it with --include-path") from error
        if task.fingerprint != settings["fingerprint"]:
            raise InputError(
                f"task {name!r} has changed since {str(folder)!r} was swept, and its answers may be to other questions;"
                " give the folder of the task as it was with --include-path, or sweep into another --out"
            )
        tasks.append((task, settings))
    failures: list[Record] = []
    with store.writing() as writer:
        untouched = [key for key, cell in store.cells().items() if cell.get("method", cell["label"]) == BASELINE]
        for task, settings in tasks:
            n = settings["documents"]
            complete = [key for key in untouched if not missing(task, key, _answerable(task, n, writer), writer.seen)]
            baseline = (complete or untouched or [""])[0]
            failures += score_store(task, n, baseline, writer, progress, again=True)
    return failures


def _data_map(run: Record) -> Path | Mapping[str, Any] | None:
    """What the last sweep that had a data map was given, as `run.json` holds it."""
    given = [sweep["spec"].get("data_map") for sweep in run["sweeps"]]
    last = next((each for each in reversed(given) if each), None)
    return Path(last) if isinstance(last, str) else last


def score_store(
    task: Scorable, n: int, baseline: str, writer: Writer, progress: SilentProgress, *, again: bool = False
) -> list[Record]:
    """Score the store's cells that are complete on the first `n` documents and not scored there yet; return failures.

    A cell that was scored while the cell `baseline` was incomplete is scored again, to be compared with it, and so is
    one that another scoring computed, which `progress` is told; again: all of them. Documents that cannot be prepared,
    and so lack in every cell, are left out for all of them alike.
    """
    doc_ids, left_out = _answerable(task, n, writer), _left_out(task, n, writer)
    complete = [key for key in writer.store.cells() if doc_ids and not missing(task, key, doc_ids, writer.seen)]
    comparable = baseline in complete
    compared, others = _scored_before(task, n, left_out, writer.store)
    if stale := [scoring for key, scoring in others.items() if key in complete]:
        before = " and ".join(sorted({scoring_text(scoring) for scoring in stale}))
        now = scoring_text(scoring_of(task.fingerprint))
        progress.note(f"note: {task.name}: metrics of scoring {before} are computed again by {now}")
    todo = [
        key
        for key in complete
        if again or key not in compared or (comparable and key != baseline and not compared[key])
    ]
    if not todo:
        return []
    if comparable:
        todo = [baseline, *(key for key in todo if key != baseline)]
    numbers = {doc_id: number for number, doc_id in enumerate(doc_ids)}
    scoring = task.only(doc_ids) if left_out else task
    failures: list[Record] = []
    reference: Mapping[str, Scored] | None = None
    for key in todo:
        answers = writer.store.rows_at(writer.seen.places(key, task.key))  # of one cell, not of all at once
        rows = [{**row, "doc_id": numbers[row["doc_id"]]} for row in answers if row["doc_id"] in numbers]
        rows.sort(key=lambda row: (row["doc_id"], row["repeat"]))  # sums depend on it; workers end in any order
        try:
            scored, records = metric_records(scoring, key, len(doc_ids), rows, reference, writer.store.folder)
        except FAULTS as error:
            failures.append(failure_record("score", task.key, (key,), (), root_cause(error)))
            writer.add_failure(failures[-1])
            progress.fail(failures[-1], 0)
            continue
        for record in records:
            if record["scores"] is not None:
                record["scores"] = {str(doc_ids[int(number)]): value for number, value in record["scores"].items()}
            record |= {"documents": n, "left_out": left_out}
        writer.add_metrics(records)
        if key == baseline:
            reference = scored
    return failures


def _left_out(task: Scorable, n: int, writer: Writer) -> list[int]:
    return sorted(unanswered(writer.store.failures(), task.key, n, writer.seen))


def _answerable(task: Scorable, n: int, writer: Writer) -> list[int]:
    left_out = set(_left_out(task, n, writer))
    return [doc_id for doc_id in range(n) if doc_id not in left_out]


def _scored_before(
    task: Scorable, n: int, left_out: list[int], store: Store
) -> tuple[dict[str, bool], dict[str, Record | None]]:
    """Cells by this scoring on these documents, with whether they were compared; cells by others, with theirs."""
    compared: dict[str, bool] = {}
    others: dict[str, Record | None] = {}
    for record in store.metrics():
        if (record["task"], record["task_fp"], record["documents"]) != (task.name, task.fingerprint, n):
            continue
        cell, scoring = record["cell"], record.get("scoring")
        if scoring != scoring_of(task.fingerprint):
            others[cell] = scoring
        elif record["left_out"] == left_out:
            compared[cell] = compared.get(cell, False) or record["diff"] is not None
    return compared, others
