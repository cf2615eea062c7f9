"""The columns of the results, each declared once: `metrics.csv`, the report, JSON and docs/columns.md read this list.

A column is computed when a cell is scored and stored (`scored`), when a store is read (`read`), or from all lines of
its table, one metric of one task (`table`). `read` is also what a store that was scored before the column existed
shows, where the answers or older records tell the value, else `default`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vtc.app.pages import page
from vtc.errors import InputError
from vtc.eval.cells import BASELINE
from vtc.eval.store import Record

if TYPE_CHECKING:
    from vtc.eval.statistics import Interval, Paired


@dataclass(frozen=True)
class Measured:
    """One metric of one cell when it is scored, over the documents `doc_ids` (N); `rows` are all answers of the cell.

    `paired` is None where there is no baseline to compare with.
    """

    value: float
    doc_ids: Collection[int]
    interval: Interval
    paired: Paired | None
    better: bool
    rows: Sequence[Record]


@dataclass(frozen=True)
class Line:
    """One metric of one cell when a store is read.

    `name` tells its cell apart from others, `record` is what was stored of the metric, `rows` returns the cell's
    answers on the task.
    """

    run: Record
    cell: Record
    name: str
    record: Record
    rows: Callable[[], Sequence[Record]]

    @property
    def paired(self) -> Mapping[str, Any]:
        """The comparison with the baseline as scoring version 0 stored it."""
        return self.record.get("paired") or {}

    def mean(self, field: str) -> float | None:
        """Mean of a field over the answers that the metric is about; None where the store does not tell which."""
        rows = self.rows()
        known = self.record.get("scores")
        if known is None and len({row["doc_id"] for row in rows}) != self.record.get("n"):
            return None
        return _mean(field, rows, None if known is None else {int(doc_id) for doc_id in known})


@dataclass(frozen=True)
class Column:
    """One column; `kind` is the type of its values, which may also be None (float takes int as well).

    since: the first scoring version (`vtc.eval.scoring.VERSION`) that stores it; 0 for columns that need none.
    """

    name: str
    kind: type
    meaning: str
    read: Callable[[Line], Any] | None = None
    scored: Callable[[Measured], Any] | None = None
    since: int = 0
    default: Any = None
    table: Callable[[Sequence[Record]], Sequence[Any]] | None = None

    def value(self, line: Line) -> Any:
        """The value in one line.

        Raises:
            InputError: what is stored is of another type.
        """
        if self.scored is not None and self.name in line.record:
            value = line.record[self.name]
        else:
            value = self.default if self.read is None else self.read(line)
        if value is None or isinstance(value, self.kind) or (self.kind is float and type(value) is int):
            return value
        where = f"metric {line.record['metric']!r} of cell {line.record['cell']}"
        raise InputError(
            f"{where}: {self.name!r} is {value!r}, no {self.kind.__name__}; remove that line of metrics.jsonl or "
            "cells.jsonl and go on"
        )


def _mean(field: str, rows: Iterable[Record], doc_ids: Collection[int] | None) -> float | None:
    values = [row.get(field) for row in rows if doc_ids is None or row["doc_id"] in doc_ids]
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _over_answers(name: str, meaning: str, since: int = 0) -> Column:
    """The mean of a field of the answers, which any store can still tell."""
    return Column(
        name, float, meaning, lambda line: line.mean(name), lambda m: _mean(name, m.rows, set(m.doc_ids)), since
    )


def _achieved(line: Line) -> Any:
    """The share of what the budget is about: counted over the answers, of time as it was measured before them."""
    quantity = line.cell.get("quantity", "tokens")
    if quantity == "time":
        return line.cell.get("achieved")
    if quantity == "tokens":
        kept, given = (line.record.get(f"visual_tokens_{name}") for name in ("kept", "in"))
        return kept / given if kept is not None and given else None
    return line.record.get(f"{quantity}_share")


def _compared(name: str, kind: type, meaning: str, field: str) -> Column:
    """A field of the comparison with the baseline, which scoring version 0 stored under "paired"."""
    return Column(name, kind, meaning, lambda line: line.paired.get(field), lambda m: getattr(m.paired, field, None))


def _holm(lines: Sequence[Record]) -> list[float | None]:
    # statsmodels takes seconds to import, which `vtc sweep` should not spend in front of its first refusal
    from vtc.eval.comparisons import holm

    return holm([line["p"] for line in lines])


def _baseline(lines: Sequence[Record]) -> Record | None:
    return next((line for line in lines if line["method"] == BASELINE), None)


def _retained(lines: Sequence[Record]) -> list[float | None]:
    untouched = _baseline(lines)
    if untouched is None or not untouched["higher_is_better"] or untouched["value"] <= 0:
        return [None] * len(lines)
    return [None if line is untouched else 100 * line["value"] / untouched["value"] for line in lines]


def in_percent(lines: Sequence[Record]) -> bool:
    """Whether a metric is shown in percent: where all its values lie in [0, 1]."""
    return all(0.0 <= line["value"] <= 1.0 for line in lines)


def _density(lines: Sequence[Record]) -> list[float | None]:
    factor = 100.0 if in_percent(lines) else 1.0
    return [
        factor * each["value"] / each["visual_tokens_kept"] if each["visual_tokens_kept"] else None for each in lines
    ]


def _seed(line: Line) -> Any:
    own = line.cell["parameters"].get("seed")
    return own if isinstance(own, int) else line.cell["seed"]


def scoring_text(scoring: Record | None) -> str:
    """A scoring (`vtc.eval.scoring.scoring_of`) in words; stores of the first format name none.

    >>> scoring_text({"version": 2, "lmms-eval": "0.7.3", "task": "0af3"}), scoring_text(None)
    ('version 2, lmms-eval 0.7.3', 'version 0')
    """
    if not isinstance(scoring, dict):
        return "version 0"
    return f"version {scoring.get('version')}, lmms-eval {scoring.get('lmms-eval')}"


def scoring_key(scoring: Record | None) -> str:
    """A text that is the same for equal scorings only."""
    return json.dumps(scoring, sort_keys=True)


COLUMNS = (
    Column("model", str, "name of the model, as asked for", lambda line: line.run["model"]["name"]),
    Column("task", str, "task", lambda line: line.record["task"]),
    Column("metric", str, "metric of the task; its families are metrics as well", lambda line: line.record["metric"]),
    Column("method", str, "method; the untouched model is `none`", lambda line: line.name),
    Column(
        "retention", float, "share asked for of what `budget` names, if any is", lambda line: line.cell["retention"]
    ),
    Column("keep", int, "visual tokens of an item asked for, if any are", lambda line: line.cell.get("keep")),
    Column("value", float, "the metric as the task aggregates it", scored=lambda m: m.value),
    Column("ci_low", float, "lower end of its 95 % interval", scored=lambda m: m.interval.low),
    Column("ci_high", float, "upper end", scored=lambda m: m.interval.high),
    Column("n", int, "questions it is about", scored=lambda m: len(m.doc_ids)),
    _over_answers("visual_tokens_in", "visual tokens of a question before compression"),
    _over_answers(
        "visual_tokens_kept",
        "mean over the LLM's layers of those that enter the layer; of an encoder alone, those that leave it",
    ),
    Column("higher_is_better", bool, "direction of the metric", scored=lambda m: m.better),
    Column("retained", float, "percent of the value of `none`", table=_retained),
    Column("tokdense", float, "value in percent over `visual_tokens_kept` (VQToken)", table=_density),
    Column("positions", str, "position policy", lambda line: line.cell.get("positions")),
    Column("seed", int, "seed of the method, or of the sweep", _seed),
    _compared("diff", float, "value minus that of `none` on the same questions", "diff"),
    _compared("diff_ci_low", float, "lower end of its 95 % interval", "low"),
    _compared("diff_ci_high", float, "upper end", "high"),
    _compared("p", float, "p value of no difference, not corrected for the number of cells", "p"),
    Column("p_holm", float, "the same after Holm's correction for all cells of the metric", table=_holm),
    _compared("n_up", int, "questions with a higher score than under `none`", "n_up"),
    _compared("n_down", int, "questions with a lower score", "n_down"),
    Column("ci_method", str, "where the interval comes from", scored=lambda m: m.interval.how),
    _compared("diff_method", str, "where p and the interval of the difference come from", "how"),
    _over_answers("output_tokens", "tokens of an answer, its end token included", since=1),
    _over_answers(
        "flops",
        "operations of a prefill or of an image's encoding, as `vtc cost` counts them under `exact`, padding left out",
        since=2,
    ),
    _over_answers("flops_share", "the same as a share of that of `none`, mean over the questions", since=2),
    _over_answers("kv_bytes", "KV cache of a question at the end of its prefill, padding left out", since=2),
    _over_answers("kv_share", "the same as a share of that of `none`", since=2),
    Column(
        "budget",
        str,
        "what retention is a share of: tokens, flops, kv or time",
        lambda c: c.cell.get("quantity", "tokens"),
    ),
    Column(
        "setting",
        float,
        "share of the visual tokens with which a budget of others is met",
        lambda c: c.cell.get("setting"),
    ),
    Column("achieved", float, "share of what the budget is about, of that of `none` on the same questions", _achieved),
    Column(
        "parameters", str, "all hyper-parameters, as JSON", lambda c: json.dumps(c.cell["parameters"], sort_keys=True)
    ),
    Column("scoring", str, "what computed the metric", lambda line: scoring_text(line.record.get("scoring"))),
    Column("cell", str, "key of the cell in the store", lambda line: line.record["cell"]),
)
NAMES = tuple(column.name for column in COLUMNS)


def scored_columns(measured: Measured) -> Record:
    """What is stored of a metric besides its names."""
    return {column.name: column.scored(measured) for column in COLUMNS if column.scored is not None}


def read_columns(line: Line) -> Record:
    """All columns of one line; those of its table are None, see `add_table_columns`."""
    return {column.name: column.value(line) for column in COLUMNS}


def add_table_columns(lines: Sequence[Record]) -> None:
    """Fill in the columns that depend on all `lines` of one metric of one task."""
    for column in COLUMNS:
        if column.table is not None:
            for line, value in zip(lines, column.table(lines), strict=True):
                line[column.name] = value


def column_page() -> str:
    """The document about the columns, in Markdown."""
    rows = [[f"`{c.name}`", c.kind.__name__, str(c.since or ""), c.meaning] for c in COLUMNS]
    return page(
        "Columns of metrics.csv",
        "python -m vtc.eval.documents",
        "one line per metric of each cell. A store that was scored before a column's version shows it where the stored"
        " answers tell it, and empty otherwise; `vtc report --rescore` computes all metrics again.",
        (["column", "type", "since scoring version", "meaning"], rows),
    )
