"""Published figures against a finished sweep: what agrees, what does not, and what the sweep says nothing of."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval.ledger import BASELINE, Benchmark, Ledger, Row, Table
from vtc.eval.results import Results, read_results
from vtc.eval.store import Record, Store
from vtc.method.registry import METHODS
from vtc.method.text import parse

CLOSE = 0.05
"""How far the visual tokens of a cell may be from the published ones, as a part of these."""
OWN = {"seed", "weights"}
"""Hyper-parameters that the ledger cannot know: whoever runs a method draws seeds and has files of their own."""


@dataclass(frozen=True)
class Finding:
    """One published figure, and what the sweep says of it.

    published, ours, difference (ours minus published), low and high (95 % interval of ours) and tolerance are in
    `unit`. agrees: None where there is nothing to compare, and `reason` then says why; low and high are None for
    figures made of several metrics.
    """

    table: str
    method: str
    tokens: str
    benchmark: str
    unit: str
    published: float
    tolerance: float
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    agrees: bool | None = None
    reason: str = ""

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure."""
        return None if self.ours is None else self.ours - self.published

    @property
    def verdict(self) -> str:
        """In words."""
        return "nothing to compare" if self.agrees is None else "reproduced" if self.agrees else "deviates"

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**dataclasses.asdict(self), "difference": self.difference, "verdict": self.verdict}


class Missing(Exception):
    """A figure that a sweep does not tell; the text says why."""


@dataclass(frozen=True)
class Measured:
    """One figure of a sweep in the unit of its benchmark, with the interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def check(ledger: Ledger, folder: Path) -> list[Finding]:
    """Compare every figure of `ledger` with the sweep in `folder`.

    Raises:
        InputError: the folder holds no sweep, or the ledger names a method that is not registered.
    """
    sweep = Sweep(read_results(folder), Store(folder).cells())
    return [
        _finding(sweep, ledger, name, table, row, column)
        for name, table in ledger.tables.items()
        for row in table.rows
        for column in row.values
    ]


def unmatched(findings: Sequence[Finding]) -> list[tuple[str, int]]:
    """Why figures were not compared, and how many each time, table by table."""
    return list(Counter(f"{each.table}: {each.reason}" for each in findings if each.agrees is None).items())


def _finding(sweep: Sweep, ledger: Ledger, name: str, table: Table, row: Row, column: str) -> Finding:
    benchmarks = ledger.benchmarks(name)
    about, published = benchmarks[column], row.values[column]
    finding = Finding(name, row.method, table.tokens_text(row), column, about.unit, published, about.tolerance)
    try:
        ours = sweep.figure(table, row, about, benchmarks)
    except Missing as missing:
        return dataclasses.replace(finding, reason=str(missing))
    agrees = abs(ours.value - published) <= about.tolerance
    return dataclasses.replace(finding, ours=ours.value, low=ours.low, high=ours.high, agrees=agrees)


class Sweep:
    """A finished sweep as the ledger asks about it."""

    def __init__(self, results: Results, cells: dict[str, Record]) -> None:
        self.results = results
        self.cells = cells
        self.model = str(results.run["model"]["name"])

    def figure(self, table: Table, row: Row, about: Benchmark, benchmarks: dict[str, Benchmark]) -> Measured:
        """The figure of a benchmark; see `Benchmark`.

        Raises:
            Missing: the sweep does not hold it.
        """
        if _last(self.model) != _last(table.checkpoint):
            raise Missing(f"another model was swept, {self.model}")
        if about.over:
            untouched = Row(method=BASELINE, values=row.values, status=row.status)
            shares = []
            for name in about.over:
                base = self.figure(table, untouched, benchmarks[name], benchmarks).value
                if not base:
                    raise Missing(f"the untouched model has 0 on {name}")
                shares.append(100 * self.figure(table, row, benchmarks[name], benchmarks).value / base)
            return Measured(sum(shares) / len(shares))
        lines = self._of_method(row)
        parts = [self._metric(lines, table, row, task, metric) for task in about.asked for metric in about.metrics]
        scale = about.scale / len(about.asked)
        value = scale * sum(line["value"] for line in parts)
        if len(parts) > 1 or parts[0]["ci_low"] is None:
            return Measured(value)
        return Measured(value, scale * parts[0]["ci_low"], scale * parts[0]["ci_high"])

    def _of_method(self, row: Row) -> list[Record]:
        name, version, parameters = identity(row.method)
        lines = [line for line in self.results.lines if self.cells[line["cell"]]["method"] == name]
        if not lines:
            raise Missing(f"{name} was not swept")
        alike = [line for line in lines if parameters.items() <= _plain(self.cells[line["cell"]]["parameters"]).items()]
        if not alike:
            raise Missing(f"{name} was swept with other hyper-parameters than {row.method}")
        current = [line for line in alike if self.cells[line["cell"]]["version"] == version]
        if not current:
            raise Missing(f"{name} was swept in another version than {version}, which is the one here")
        return current

    def _metric(self, lines: list[Record], table: Table, row: Row, task: str, metric: str) -> Record:
        """The line of a task's metric whose tokens are nearest to those of the row."""
        lines = [line for line in lines if line["task"] == task]
        if not lines:
            raise Missing(f"{task} was not swept")
        about = self.results.run["tasks"][task]
        if about["documents"] < about.get("of", about["documents"]):
            raise Missing(f"only {about['documents']} of the {about['of']} questions of {task} were asked")
        lines = [line for line in lines if line["metric"] == metric]
        if not lines:
            raise Missing(f"{task} was not scored by {metric}")
        wanted = table.tokens(row)
        if wanted is None:
            return lines[0]
        found = [(tokens, line) for line in lines if (tokens := _tokens(table, line, wanted)) is not None]
        if not found:
            raise Missing("the sweep does not tell its visual tokens")
        tokens, line = min(found, key=lambda each: abs(each[0] - wanted))
        if abs(tokens - wanted) > CLOSE * wanted:
            raise Missing(
                f"tokens of {row.method} differ by more than {CLOSE:.0%}: {tokens:.4g} here, not {wanted:.4g}"
            )
        return line


def _tokens(table: Table, line: Record, wanted: float) -> float | None:
    """What a table compares of a line: visual tokens, their share, or those asked for."""
    kept, given = line["visual_tokens_kept"], line["visual_tokens_in"]
    if table.compare == "asked":
        if line["budget"] != "tokens":
            return None
        if line["keep"] is not None:
            return float(line["keep"])
        return wanted if line["retention"] is None else float(line["retention"]) * (table.total or 1.0)
    if kept is None or given is None:
        return None
    return float(kept) if table.compare == "count" else float(kept) / float(given)


def identity(method: str) -> tuple[str, int, dict[str, str]]:
    """Name, version and hyper-parameters by which its cells are known, each value as `_plain` has it.

    Nothing is made, so that no weights need to lie here. Of learned methods only what is written counts: the rest
    comes from the file of their weights.

    Raises:
        UnknownName: no such method.
        InputError: it has no such hyper-parameter.

    >>> identity("fastv(ratio=0.5)")
    ('fastv', 1, {'schedule': 'null', 'layer': '2.0', 'ratio': '0.5', 'scope': '"item"'})
    """
    ((given,),) = parse(method)
    if given.name == BASELINE:
        return BASELINE, 1, {}
    kind = METHODS.get(given.name)
    fields = [field for field in dataclasses.fields(kind) if field.compare]
    unknown = set(given.parameters) - {field.name for field in fields}
    if unknown:
        known = ", ".join(field.name for field in fields)
        raise InputError(f"{method}: {given.name} has no {min(unknown)!r}; it has {known}")
    defaults = {} if kind.trained else {field.name: _default(field) for field in fields}
    return given.name, kind.version, _plain({**defaults, **given.parameters})


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(parameters: dict[str, Any]) -> dict[str, str]:
    """Hyper-parameters as text, equal for equal numbers, tuples and lists; those of `OWN` are left out."""
    return {
        name: json.dumps(float(value) if type(value) is int else value, default=list)
        for name, value in parameters.items()
        if name not in OWN
    }


def _last(name: str) -> str:
    """A model without the folder or account it comes from."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
