"""Results as tables for people: methods x retentions of one metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from vtc.eval.cells import BASELINE
from vtc.eval.results import Results
from vtc.eval.store import Record


@dataclass(frozen=True)
class Grid:
    """One metric of one task as methods x retentions; `baseline` and entries are lines, None where there is none."""

    task: str
    metric: str
    percent: bool
    baseline: Record | None
    retentions: Sequence[float | None]
    methods: Sequence[str]
    entries: dict[tuple[str, float | None], Record]

    def show(self, value: float | None) -> str:
        """A value of the metric as text: in percent where all values lie in [0, 1]."""
        if value is None:
            return "-"
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"

    def show_diff(self, value: float | None) -> str:
        """A difference of two values as text, with its sign."""
        if value is None:
            return "-"
        return f"{100 * value + 0.0:+.1f}" if self.percent else f"{value + 0.0:+.4g}"


def grid(results: Results, task: str, metric: str) -> Grid:
    """Arrange one metric of one task."""
    lines = results.select(task, metric)
    compressed = [line for line in lines if line["method"] != BASELINE]
    return Grid(
        task=task,
        metric=metric,
        percent=all(0.0 <= line["value"] <= 1.0 for line in lines),
        baseline=next((line for line in lines if line["method"] == BASELINE), None),
        retentions=sorted({line["retention"] for line in compressed}, key=lambda r: (r is None, -(r or 0.0))),
        methods=list(dict.fromkeys(line["method"] for line in compressed)),
        entries={(line["method"], line["retention"]): line for line in compressed},
    )


def significant(line: Record) -> bool:
    """Whether a cell differs from the baseline at p < 0.05, not corrected for the number of comparisons."""
    return line["p"] is not None and line["p"] < 0.05


def nominal(retention: float | None) -> str:
    """A retention as asked for; ``own`` for methods that are not asked."""
    return "own" if retention is None else f"{retention:g}"


def tokens(line: Record) -> str:
    """Achieved visual tokens of a line, such as ``72 of 144``."""
    return f"{line['visual_tokens_kept']:.4g} of {line['visual_tokens_in']:.4g}"


def console_title(results: Results, task: str) -> str:
    """One line above the table of a task."""
    data = grid(results, task, results.main_metric(task))
    n = data.baseline["n"] if data.baseline else results.run["tasks"][task]["documents"]
    unit = " (%)" if data.percent else ""
    return f"{task}: {data.metric}{unit}, {n} questions, {results.run['model']['name']}"


NOTE = "beside each value: visual tokens entering an LLM layer, achieved; *: differs from the untouched model, p < 0.05"


def console_table(results: Results, task: str) -> Table:
    """Methods x retentions of a task's main metric, the achieved tokens beside each value."""
    data = grid(results, task, results.main_metric(task))
    table = Table()
    table.add_column("method")
    for retention in data.retentions:
        table.add_column(nominal(retention), justify="right")
    if data.baseline:
        whole = f"{data.show(data.baseline['value'])} [dim]{data.baseline['visual_tokens_in']:.4g}[/dim]"
        table.add_row("untouched", whole, *[""] * (len(data.retentions) - 1), end_section=True)
    for method in data.methods:
        row = []
        for retention in data.retentions:
            line = data.entries.get((method, retention))
            mark = "*" if line and significant(line) else ""
            row.append(f"{data.show(line['value'])}{mark} [dim]{line['visual_tokens_kept']:.4g}[/dim]" if line else "-")
        table.add_row(method.replace("[", r"\["), *row)
    return table
