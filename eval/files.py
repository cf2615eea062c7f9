"""Tables and figures as files for other programs: CSV, Parquet, Markdown, LaTeX, PNG, SVG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from vtc.app import pages
from vtc.eval import charts, curves
from vtc.eval.columns import COLUMNS
from vtc.eval.results import Results, to_csv
from vtc.eval.store import Record
from vtc.eval.tables import Grid, grid, nominal, short_names, significant

if TYPE_CHECKING:
    import pandas as pd

KINDS = {int: "Int64", float: "Float64", bool: "boolean", str: "string"}
CAPTION = (
    "{task}, {metric}{unit}, {n} questions, {model}; *: differs from the untouched model, Holm-corrected p < 0.05."
)


def files(results: Results) -> dict[str, bytes]:
    """`metrics.csv` and `.parquet`, `table.md` and `.tex`, `figure.png` and `.svg`."""
    figure = curves.figure(results)
    parquet = io.BytesIO()
    frame(results).to_parquet(parquet, index=False)
    return {
        "metrics.csv": to_csv(results).encode(),
        "metrics.parquet": parquet.getvalue(),
        "table.md": markdown(results).encode(),
        "table.tex": latex(results).encode(),
        "figure.png": charts.picture(figure, "png"),
        "figure.svg": charts.picture(figure, "svg"),
    }


def frame(results: Results) -> pd.DataFrame:
    """The lines of `metrics.csv` as a data frame with typed columns; what does not exist is missing."""
    import pandas as pd

    rows = [[line[column.name] for column in COLUMNS] for line in results.lines]
    made = pd.DataFrame(rows, columns=pd.Index([column.name for column in COLUMNS]), dtype=object)
    return made.astype({column.name: KINDS[column.kind] for column in COLUMNS})


def table(data: Grid) -> pd.DataFrame:
    """Methods x retentions of one metric as text, the untouched model first."""
    import pandas as pd

    columns = {retention: nominal(retention) for retention in data.retentions} or {1.0: "1"}
    rows: dict[str, list[str]] = {}
    if data.baseline is not None:
        rows["untouched"] = [data.show(data.baseline["value"]), *[""] * (len(columns) - 1)]
    for method, name in short_names(data.methods).items():
        rows[name] = [_cell(data, data.entries.get((method, retention))) for retention in columns]
    made = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns.values()))
    return made.rename_axis("method").reset_index()


def _cell(data: Grid, line: Record | None) -> str:
    if line is None:
        return "-"
    spread = f" ± {data.show(line['spread'])}" if line.get("spread") is not None else ""
    return f"{data.show(line['value'])}{spread}{'*' if significant(line) else ''}"


def markdown(results: Results) -> str:
    """The main metric of each task as Markdown tables."""
    parts = []
    for data in _grids(results):
        shown = table(data).map(_escaped)
        rows = [[str(cell) for cell in row] for row in shown.itertuples(index=False)]
        parts.append(f"{_caption(results, data)}\n\n{pages.table(list(shown.columns), rows)}\n")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def latex(results: Results) -> str:
    """The main metric of each task as LaTeX tables with booktabs' rules."""
    parts = []
    for data in _grids(results):
        shown = table(data)
        style = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        form = "l" + "r" * (len(shown.columns) - 1)
        text = style.to_latex(hrules=True, column_format=form).replace("±", "$\\pm$")
        parts.append(f"% {_caption(results, data)}\n{text}")
    return "\n".join(parts)


def _grids(results: Results) -> list[Grid]:
    return [grid(results, task, results.main_metric(task)) for task in results.tasks if results.metrics(task)]


def _caption(results: Results, data: Grid) -> str:
    n = data.baseline["n"] if data.baseline else results.run["tasks"][data.task]["documents"]
    unit = " (%)" if data.percent else ""
    model = " ".join(str(results.run["model"]["name"]).split())
    return CAPTION.format(task=data.task, metric=data.metric, unit=unit, n=n, model=model)
