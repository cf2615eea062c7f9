"""What a store says, as one flat table: the lines of `metrics.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.eval.failures import TaskKey, unanswered
from vtc.eval.store import Record, Store, row_key

COLUMNS = (
    "model",
    "task",
    "metric",
    "method",
    "retention",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "visual_tokens_in",
    "visual_tokens_kept",
    "higher_is_better",
    "positions",
    "seed",
    "diff",
    "diff_ci_low",
    "diff_ci_high",
    "p",
    "n_up",
    "n_down",
    "ci_method",
    "diff_method",
    "parameters",
    "cell",
)


@dataclass(frozen=True)
class Incomplete:
    """A cell that was asked for and lacks answers or metrics on a task; `reason` is its last recorded failure."""

    task: str
    method: str
    retention: float | None
    answered: int
    wanted: int
    reason: str


@dataclass(frozen=True)
class Unanswered:
    """A document that no cell could be asked about, and that every metric of its task leaves out."""

    task: str
    doc_id: int
    reason: str


@dataclass(frozen=True)
class Results:
    """All results of a store. `lines` are the lines of `metrics.csv`: one metric of one cell each."""

    run: Record
    lines: Sequence[Record]
    incomplete: Sequence[Incomplete]
    unanswered: Sequence[Unanswered] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order in which they were first swept."""
        return list(self.run["tasks"])

    def main_metric(self, task: str) -> str:
        """The metric by which a task is judged, the first that it declares, or the first that it has."""
        declared = str(self.run["tasks"][task]["main_metric"])
        metrics = self.metrics(task)
        return declared if declared in metrics or not metrics else metrics[0]

    def metrics(self, task: str) -> list[str]:
        """The metrics of a task, as the task orders them."""
        return list(dict.fromkeys(line["metric"] for line in self.lines if line["task"] == task))

    def select(self, task: str, metric: str) -> list[Record]:
        """The lines of one metric of one task."""
        return [line for line in self.lines if line["task"] == task and line["metric"] == metric]


def read_results(folder: Path) -> Results:
    """Everything a store knows about its tasks, each over the documents of the last sweep that asked about it.

    Raises:
        InputError: the folder holds no sweep.
    """
    store = Store(folder)
    run, cells = store.run(), store.cells()
    names = _series_names(cells)
    order = {key: position for position, key in enumerate(cells)}
    lines = []
    for record in sorted(store.metrics(), key=lambda r: order[r["cell"]]):
        task = run["tasks"].get(record["task"])
        if task and (record["task_fp"], record["documents"]) == (task["fingerprint"], task["documents"]):
            lines.append(_line(run, cells[record["cell"]], names[record["cell"]], record))
    lost = _unanswered(store, run)
    return Results(run, lines, _incomplete(store, run, cells, names, lines, lost), lost)


def _line(run: Record, cell: Record, name: str, record: Record) -> Record:
    paired = record["paired"] or {}
    return {
        "model": run["model"]["name"],
        "method": name,
        "retention": cell["retention"],
        "positions": cell["positions"],
        "seed": cell["parameters"].get("seed", cell["seed"]),
        "diff": paired.get("diff"),
        "diff_ci_low": paired.get("low"),
        "diff_ci_high": paired.get("high"),
        "p": paired.get("p"),
        "n_up": paired.get("n_up"),
        "n_down": paired.get("n_down"),
        "diff_method": paired.get("how"),
        "parameters": json.dumps(cell["parameters"], sort_keys=True),
    } | {name: record[name] for name in COLUMNS if name in record}


def _series_names(cells: dict[str, Record]) -> dict[str, str]:
    """A name per cell that tells methods apart: the label, with whatever else differs between cells of that label."""
    shared = Counter((cell["label"], cell["retention"]) for cell in cells.values())
    names = {}
    for key, cell in cells.items():
        extra = {"positions": cell["positions"], **cell["parameters"], "version": cell["version"]}
        others = [c for c in cells.values() if (c["label"], c["retention"]) == (cell["label"], cell["retention"])]
        differing = [
            f"{name}={value}"
            for name, value in extra.items()
            if any(
                {"positions": c["positions"], **c["parameters"], "version": c["version"]}.get(name) != value
                for c in others
            )
        ]
        several = shared[cell["label"], cell["retention"]] > 1
        names[key] = f"{cell['label']} [{', '.join(differing)}]" if several else cell["label"]
    return names


def _incomplete(
    store: Store,
    run: Record,
    cells: dict[str, Record],
    names: dict[str, str],
    lines: Sequence[Record],
    lost: Sequence[Unanswered],
) -> list[Incomplete]:
    answered: Counter[tuple[str, str]] = Counter()
    for row in store.rows():
        task = run["tasks"].get(row["task"])
        if task and row["task_fp"] == task["fingerprint"] and row["doc_id"] < task["documents"]:
            answered[row["task"], row["cell"]] += 1
    reasons = {
        (failure["task"], cell): f"{failure['stage']}: {failure['error']}: {failure['reason']}"
        for failure in store.failures()
        for cell in failure["cells"]
    }
    scored = {(line["task"], line["cell"]) for line in lines}
    incomplete = []
    for name, task in run["tasks"].items():
        wanted = (task["documents"] - sum(entry.task == name for entry in lost)) * task["repeats"]
        for key in (key for key in task["cells"] if key in cells):  # written before its line of cells.jsonl is
            if answered[name, key] < wanted or (name, key) not in scored:
                reason = reasons.get((name, key), "not answered yet")
                cell = cells[key]
                incomplete.append(Incomplete(name, names[key], cell["retention"], answered[name, key], wanted, reason))
    return incomplete


def _unanswered(store: Store, run: Record) -> list[Unanswered]:
    seen = {row_key(row) for row in store.rows()}
    failures = store.failures()
    lost = []
    for name, task in run["tasks"].items():
        key = TaskKey(name, task["fingerprint"])
        for doc_id, failure in unanswered(failures, key, task["documents"], seen).items():
            lost.append(Unanswered(name, doc_id, f"{failure['error']}: {failure['reason']}"))
    return lost


def to_csv(results: Results) -> str:
    """The lines as CSV with the columns `COLUMNS`; what does not exist is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in results.lines)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, with the apostrophe in front that makes it text again."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def json_summary(results: Results) -> dict[str, Any]:
    """The results as JSON values."""
    return {
        "model": results.run["model"],
        "tasks": results.run["tasks"],
        "metrics": list(results.lines),
        "incomplete": [vars(entry) for entry in results.incomplete],
        "unanswered": [vars(entry) for entry in results.unanswered],
    }
