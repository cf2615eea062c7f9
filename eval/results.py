"""What a store says, as one flat table: the lines of `metrics.csv`."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval.columns import NAMES, Line, add_table_columns, read_columns, scoring_key, scoring_text
from vtc.eval.failures import TaskKey, unanswered
from vtc.eval.scoring import scoring_of
from vtc.eval.seen import Seen
from vtc.eval.store import Record, Store

Asked = float | str | None
"""A budget as tables have it: a retention; a number of tokens, such as "64 tokens"; None where none is asked for."""


def asked(line: Mapping[str, Any]) -> Asked:
    """The budget of a line of the results, or of a cell.

    >>> asked({"retention": 0.5}), asked({"retention": None, "keep": 64})
    (0.5, '64 tokens')
    """
    keep = line.get("keep")
    share: float | None = line["retention"]
    return share if keep is None else f"{keep} tokens"


def budget_order(budget: Asked) -> tuple[int, float]:
    """What budgets are sorted by: retentions, then numbers of tokens, the largest first; those of nobody last."""
    if budget is None:
        return 2, 0.0
    return (1, -float(budget.split()[0])) if isinstance(budget, str) else (0, -budget)


@dataclass(frozen=True)
class Incomplete:
    """A cell that was asked for and lacks answers or metrics on a task; `reason` is its last recorded failure."""

    task: str
    method: str
    retention: Asked
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
class Outdated:
    """Cells of a task whose metrics another scoring computed; `shown` is whether they are among the lines.

    Lines of one task all have one scoring: the present one where it computed any of them, else the most frequent.
    """

    task: str
    scoring: str
    now: str
    cells: int
    shown: bool

    def __str__(self) -> str:
        what = "are shown as they were scored" if self.shown else "are left out beside those of this one"
        return (
            f"{self.task}: metrics of {self.cells} cells by scoring {self.scoring} {what}; this is {self.now}, and "
            "`vtc report --rescore` computes all of them again from the stored answers"
        )


@dataclass(frozen=True)
class Results:
    """All results of a store. `lines` are the lines of `metrics.csv`: one metric of one cell each.

    `stored` holds by task, metric and cell what was scored by document (`vtc.eval.scoring.metric_records`), `cells` the
    settings of each cell by its key.
    """

    run: Record
    lines: Sequence[Record]
    incomplete: Sequence[Incomplete]
    unanswered: Sequence[Unanswered] = ()
    outdated: Sequence[Outdated] = ()
    stored: Mapping[tuple[str, str, str], Record] = field(default_factory=dict)
    cells: Mapping[str, Record] = field(default_factory=dict)

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

    Scores of a cell that lacks answers, which it had when it was scored, are left out.

    Raises:
        InputError: the folder holds no sweep, or results of a cell without the cell.
    """
    store = Store(folder)
    run, cells, metrics = store.run(), store.cells(), store.metrics()
    if alone := [record["cell"] for record in metrics if record["cell"] not in cells]:
        raise InputError(
            f"{folder / 'metrics.jsonl'} has results of the cell {alone[0]}, which cells.jsonl beside it lacks; "
            "sweep it again, which adds the cell, or take its lines out of both"
        )
    names = _series_names(cells)
    order = {key: position for position, key in enumerate(cells)}
    records, outdated = _of_one_scoring(run, metrics)
    lines = []

    seen, failures = store.index(), store.failures()
    lost = _unanswered(failures, run, seen)
    answered = _answered(run, lost, seen)
    if len(seen):  # a packed store has scores alone
        short = {key for key, (there, wanted) in answered.items() if there < wanted}
        records = [each for each in records if (each["task"], each["cell"]) not in short]

    def of(task: str, cell: str) -> list[Record]:  # read for old stores alone
        asked = run["tasks"][task]
        rows = store.rows_at(seen.places(cell, (task, asked["fingerprint"])))
        return [row for row in rows if row["doc_id"] < asked["documents"]]

    for record in sorted(records, key=lambda r: order[r["cell"]]):
        key = record["cell"]
        line = Line(run, cells[key], names[key], record, partial(of, record["task"], key))
        lines.append(read_columns(line))
    tables: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for each in lines:
        tables[each["task"], each["metric"]].append(each)
    for table in tables.values():
        add_table_columns(table)
    stored = {(record["task"], record["metric"], record["cell"]): record for record in records}
    incomplete = _incomplete(failures, cells, names, lines, answered)
    return Results(run, lines, incomplete, lost, outdated, stored, cells)


def _of_one_scoring(run: Record, records: Sequence[Record]) -> tuple[list[Record], list[Outdated]]:
    """The metrics to show, and what is to be said of those that another scoring computed; see `Outdated`."""
    shown: list[Record] = []
    outdated = []
    for name, task in run["tasks"].items():
        about = name, task["fingerprint"], task["documents"]
        here = [each for each in records if (each["task"], each["task_fp"], each["documents"]) == about]
        groups: dict[str, list[Record]] = defaultdict(list)
        for record in here:
            groups[scoring_key(record.get("scoring"))].append(record)
        now = scoring_of(task["fingerprint"])
        best = max(groups, key=lambda key: (key == scoring_key(now), len(groups[key])), default="")
        shown += groups.get(best, [])
        for key, group in groups.items():
            if key != scoring_key(now):
                cells = len({record["cell"] for record in group})
                before = scoring_text(group[0].get("scoring"))
                outdated.append(Outdated(name, before, scoring_text(now), cells, key == best))
    return shown, outdated


def _series_names(cells: dict[str, Record]) -> dict[str, str]:
    """A name per cell that tells methods apart: the label, with whatever else differs between cells of that label."""
    alike: dict[tuple[str, float | None, int | None], list[Record]] = defaultdict(list)
    for cell in cells.values():
        alike[cell["label"], cell["retention"], cell.get("keep")].append(_settings(cell))
    names = {}
    for key, cell in cells.items():
        others = alike[cell["label"], cell["retention"], cell.get("keep")]
        settings = _settings(cell).items()
        differing = [
            f"{name}={value}" for name, value in settings if any((name, value) not in c.items() for c in others)
        ]
        names[key] = f"{cell['label']} [{', '.join(differing)}]" if differing else cell["label"]
    return names


def _settings(cell: Record) -> Record:
    about = {"positions": cell.get("positions"), "budget": cell.get("quantity", "tokens")}
    return {**about, **cell["parameters"], "version": cell["version"]}


def _incomplete(
    failures: Sequence[Record],
    cells: dict[str, Record],
    names: dict[str, str],
    lines: Sequence[Record],
    answered: Mapping[tuple[str, str], tuple[int, int]],
) -> list[Incomplete]:
    reasons = {
        (failure["task"], cell): f"{failure['stage']}: {failure['error']}: {failure['reason']}"
        for failure in failures
        for cell in failure["cells"]
    }
    scored = {(line["task"], line["cell"]) for line in lines}
    incomplete = []
    for (name, key), (there, wanted) in answered.items():
        if key in cells and (there < wanted or (name, key) not in scored):  # a cell is written after its key
            default = (
                "not answered yet"
                if there < wanted
                else "not scored by this version yet, which `vtc report --rescore` does"
            )
            reason = reasons.get((name, key), default)
            incomplete.append(Incomplete(name, names[key], asked(cells[key]), there, wanted, reason))
    return incomplete


def _answered(run: Record, lost: Sequence[Unanswered], seen: Seen) -> dict[tuple[str, str], tuple[int, int]]:
    """By task and cell how many answers are there, and how many are wanted."""
    found = {}
    for name, task in run["tasks"].items():
        wanted = (task["documents"] - sum(entry.task == name for entry in lost)) * task["repeats"]
        for key in task["cells"]:
            found[name, key] = seen.count(key, (name, task["fingerprint"]), task["documents"]), wanted
    return found


def _unanswered(failures: Sequence[Record], run: Record, seen: Seen) -> list[Unanswered]:
    lost = []
    for name, task in run["tasks"].items():
        key = TaskKey(name, task["fingerprint"])
        for doc_id, failure in unanswered(failures, key, task["documents"], seen).items():
            lost.append(Unanswered(name, doc_id, f"{failure['error']}: {failure['reason']}"))
    return lost


def to_csv(results: Results) -> str:
    """The lines as CSV with the columns of `vtc.eval.columns`; what does not exist is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_text(value) for name, value in line.items()} for line in results.lines)
    return text.getvalue()


def plain_text(value: Any) -> Any:
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
        "outdated": [vars(entry) for entry in results.outdated],
    }
