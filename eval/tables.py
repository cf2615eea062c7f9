"""Results as tables for people: methods x retentions of one metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vtc.eval.cells import BASELINE
from vtc.eval.columns import in_percent
from vtc.eval.results import Asked, Results, asked, budget_order
from vtc.eval.seeds import pools
from vtc.eval.store import Record


@dataclass(frozen=True)
class Grid:
    """One metric of one task as methods x retentions; `baseline` and entries are lines, None where there is none."""

    task: str
    metric: str
    percent: bool
    baseline: Record | None
    retentions: Sequence[Asked]
    methods: Sequence[str]
    entries: dict[tuple[str, Asked], Record]

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
    """Arrange one metric of one task; three or more seeds of a method are one line (`vtc.eval.seeds`)."""
    lines = [line for _, line in pools(results, task, metric)]
    compressed = [line for line in lines if line["method"] != BASELINE]
    return Grid(
        task=task,
        metric=metric,
        percent=in_percent(lines),
        baseline=next((line for line in lines if line["method"] == BASELINE), None),
        retentions=sorted({asked(line) for line in compressed}, key=budget_order),
        methods=list(dict.fromkeys(line["method"] for line in compressed)),
        entries={(line["method"], asked(line)): line for line in compressed},
    )


def significant(line: Record) -> bool:
    """Whether a cell differs from the baseline at p < 0.05 after Holm's correction for the cells of its table."""
    return line["p_holm"] is not None and line["p_holm"] < 0.05


def nominal(budget: Asked) -> str:
    """A budget as asked for; ``own`` for methods that are not asked."""
    return "own" if budget is None else budget if isinstance(budget, str) else f"{budget:g}"


def tokens(line: Record) -> str:
    """Achieved visual tokens of a line, such as ``72 of 144``."""
    return f"{line['visual_tokens_kept']:.4g} of {line['visual_tokens_in']:.4g}"


def console_title(results: Results, task: str) -> str:
    """One line above the table of a task."""
    data = grid(results, task, results.main_metric(task))
    n = data.baseline["n"] if data.baseline else results.run["tasks"][task]["documents"]
    unit = " (%)" if data.percent else ""
    return f"{task}: {data.metric}{unit}, {n} questions, {results.run['model']['name']}"


NOTE = (
    "with each value: visual tokens entering an LLM layer, or leaving an encoder, achieved; *: differs from the "
    "untouched model, p < 0.05 after Holm's correction"
)


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Each method as narrow tables and legends show it: without its hyper-parameters where the name alone tells it.

    >>> short_names(["random(seed=1)", "random", "atp(weights=atp-tiny-llava)"])
    {'random(seed=1)': 'random(seed=1)', 'random': 'random', 'atp(weights=atp-tiny-llava)': 'atp'}
    """
    bare = {method: method.split("(")[0] for method in methods}
    shared = Counter(bare.values())
    return {method: name if shared[name] == 1 and "+" not in method else method for method, name in bare.items()}


def console_table(results: Results, task: str, width: int = 0) -> Table:
    """Methods x retentions of a task's main metric with the achieved tokens, which stand below each value where `width`
    columns do not take them beside it. Nothing is cut off: what is still too wide exceeds `width`.
    """
    data = grid(results, task, results.main_metric(task))
    wide = _table(data, " ", box.HEAVY_HEAD)
    needed = _needed(wide)
    if needed > width > 0:
        wide = _table(data, "\n", box.SIMPLE_HEAD)
        needed = _needed(wide)
    wide.width = needed
    return wide


def _needed(table: Table) -> int:
    console = Console(width=10_000)
    return Measurement.get(console, console.options, table).maximum


def _table(data: Grid, between: str, look: box.Box) -> Table:
    table = Table(box=look, padding=(0, 1) if between == " " else (0, 1, 0, 0), show_edge=between == " ")
    table.add_column("method", no_wrap=True)
    for retention in data.retentions:
        table.add_column(nominal(retention), justify="right", no_wrap=True)

    def cell(line: Record | None, tokens: str, mark: str = "") -> Text:
        if line is None:
            return Text("-")
        spread = f"±{data.show(line['spread'])}" if line.get("spread") is not None else ""
        return Text.assemble(data.show(line["value"]), spread, mark, between, (f"{line[tokens]:.4g}", "dim"))

    if data.baseline:
        rest = [Text()] * (len(data.retentions) - 1)
        table.add_row("untouched", cell(data.baseline, "visual_tokens_in"), *rest, end_section=True)
    names = short_names(data.methods)
    for method in data.methods:
        lines = [data.entries.get((method, retention)) for retention in data.retentions]
        marks = ["*" if line and significant(line) else "" for line in lines]
        cells = [cell(line, "visual_tokens_kept", mark) for line, mark in zip(lines, marks, strict=True)]
        table.add_row(Text(names[method]), *cells)
    return table
