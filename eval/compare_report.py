"""The files of a comparison: `compare.csv` and the self-contained `compare.html`; and its table on the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from vtc.eval import charts
from vtc.eval.cells import BASELINE
from vtc.eval.compare import Compared, Comparison, comparison_csv
from vtc.eval.page import Page
from vtc.eval.tables import nominal, short_names
from vtc.eval.writing import write_files

NOTE = "differences are second minus first; *: p < 0.05 after Holm's correction for all methods and retentions"


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write both files into `folder`, which is created if needed.

    Raises:
        InputError: it cannot be written.
    """
    write_files(folder, {"compare.csv": comparison_csv(comparison).encode(), "compare.html": page(comparison).encode()})


def page(comparison: Comparison) -> str:
    """The comparison as one HTML page."""
    made = Page()
    tables = [_table(made, comparison, *about) for about in _tables(comparison)]
    title = f"{comparison.second} compared with {comparison.first}"
    return made.render("compare.html", title=title, comparison=comparison, tables=tables)


def _tables(comparison: Comparison) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.task, row.metric) for row in comparison.rows))


def _table(made: Page, comparison: Comparison, task: str, metric: str) -> dict[str, Any]:
    rows = comparison.select(task, metric)
    factor = scale(rows)
    names = short_names(list(dict.fromkeys(row.method for row in rows)))
    boards = []
    for retention in dict.fromkeys(row.retention for row in rows):
        drawn = [
            {
                "name": "untouched" if row.method == BASELINE else names[row.method],
                "value": round(factor * row.diff, 3),
                "low": None if row.diff_low is None else round(factor * row.diff_low, 3),
                "high": None if row.diff_high is None else round(factor * row.diff_high, 3),
                "p_holm": row.p_holm, "sure": sure(row), "text": f"{factor * row.diff + 0.0:+.4g}",
            }
            for row in sorted((row for row in rows if row.retention == retention), key=lambda row: -row.diff)
        ]  # fmt: skip
        chart = made.chart(charts.dots(drawn, f"difference in {metric}{unit(factor)}", at=0.0))
        boards.append({"name": nominal(retention), "chart": chart})
    return {"task": task, "metric": metric, "rows": rows, "factor": factor, "unit": unit(factor), "boards": boards}


def scale(rows: list[Compared]) -> float:
    """What values are shown times: 100 where all lie in [0, 1]."""
    return 100.0 if all(0.0 <= value <= 1.0 for row in rows for value in (row.first, row.second)) else 1.0


def unit(factor: float) -> str:
    """The unit of values shown times `factor`."""
    return " (%)" if factor == 100.0 else ""


def sure(row: Compared) -> bool:
    """Whether a row's difference has p < 0.05 after Holm's correction."""
    return row.p_holm is not None and row.p_holm < 0.05


def console_table(comparison: Comparison, task: str) -> Table:
    """The first metric of a task: a line per method and retention with both values, difference and retained percent."""
    rows = comparison.select(task, next(metric for name, metric in _tables(comparison) if name == task))
    factor = scale(rows)
    table = Table(title=f"{task}: {rows[0].metric}{unit(factor)}, {rows[0].n} questions", title_justify="left")
    for name in ("method", "retention", "first", "second", "difference", "95 %", "retained, %", "difference"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        ends = "-"
        if row.diff_low is not None and row.diff_high is not None:
            ends = f"{factor * row.diff_low:+.1f} to {factor * row.diff_high:+.1f}"
        kept = "-" if row.first_retained is None else f"{row.first_retained:.1f} -> {row.second_retained:.1f}"
        table.add_row(
            Text("untouched" if row.method == BASELINE else row.method),
            nominal(row.retention),
            f"{factor * row.first:.4g}",
            f"{factor * row.second:.4g}",
            f"{factor * row.diff + 0.0:+.4g}{'*' if sure(row) else ''}",
            ends,
            kept,
            "-" if row.retained_diff is None else f"{row.retained_diff + 0.0:+.1f}",
        )
    wide = Console(width=10_000)
    table.width = Measurement.get(wide, wide.options, table).maximum  # nothing is cut off
    return table
