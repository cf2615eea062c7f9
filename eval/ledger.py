"""The reproduction ledger: published figures of the methods, as YAML files that a finished sweep is compared with.

`docs/ledger/` of the checkout holds one file per published table, and `benchmarks.yaml`, which says once by which task
and metric of lmms-eval each benchmark is asked and how far a reproduction may be off. `vtc.eval.ledger_check` compares.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vtc.errors import InputError
from vtc.method.text import parse

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "ledger"
"""Where the ledger of a checkout lies; a package that was installed has none."""
BENCHMARKS = "benchmarks.yaml"
BASELINE = "none"
Status = Literal["reproduced", "deviates", "not run here"]
Certainty = Literal["as printed", "second-hand", "reported from memory"]


class Part(BaseModel):
    """Whatever stands in a file: keys it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Kind = TypeVar("Kind", bound=Part)


class Benchmark(Part):
    """How one published column is measured here: by a task, or as the mean over other columns.

    task: what `vtc sweep --tasks` takes. metric: of that task; several are added up. parts: where the task is a group,
    its tasks, over which the mean is taken. scale: what turns the metric into `unit`. over: names of other columns
    instead of a task; each is a per cent of the untouched model's, and the mean of these is the figure. tolerance: how
    far ours may be off, in `unit`, and `why` so far. note: what is known to differ from the published harness.
    """

    task: str | None = None
    metric: str | tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    scale: float = Field(default=1.0, gt=0)
    over: tuple[str, ...] = ()
    unit: Literal["%", "points", "% of none"]
    tolerance: float = Field(gt=0)
    why: str = Field(min_length=1)
    note: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Benchmark:
        if bool(self.over) == (self.task is not None) or bool(self.over) == bool(self.metric):
            raise InputError("a benchmark has a task and a metric, or stands over others; write one of the two")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are added up."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def asked(self) -> tuple[str, ...]:
        """The tasks as a finished sweep names them."""
        return self.parts or ((self.task,) if self.task else ())


class Row(Part):
    """One line of a published table: a method with its hyper-parameters at one number of visual tokens.

    method: as `vtc sweep --methods` takes it, or ``none``. kept: visual tokens, as the table counts them; share: the
    same as a fraction of those in the input. The untouched model has neither. label: what the paper calls the line.
    """

    method: str
    kept: float | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0, le=1)
    label: str = ""
    values: dict[str, float] = Field(min_length=1)
    status: Status
    note: str = ""

    @field_validator("method")
    @classmethod
    def _one_method(cls, given: str) -> str:
        methods = parse(given)
        if len(methods) != 1 or len(methods[0]) != 1 or methods[0][0].budget is not None:
            raise InputError(f"{given!r} is not one method without a budget; write for example fastv(layer=3)")
        return given

    @model_validator(mode="after")
    def _has_tokens(self) -> Row:
        if sum(each is not None for each in (self.kept, self.share)) != (self.method != BASELINE):
            raise InputError(f"{self.method}: write either kept or share, and for {BASELINE} neither")
        return self

    @property
    def name(self) -> str:
        """The registered name of the method."""
        return parse(self.method)[0][0].name


class Table(Part):
    """One published table, or what an abstract states.

    source: where in the paper, or which other text. certainty: whether the figures were read there, in a text about it,
    or are remembered. checkpoint: the hub name of the weights. total: visual tokens of an input, None where it depends
    on the input. compare: what of a sweep is held against the tokens of a row, which must agree within 5 %: the "count"
    that enters the LLM's layers in the mean, this as a "share" of the input's, or what was "asked" for. command: runs
    all rows. benchmarks: columns that only this table has.
    """

    paper: str
    arxiv: str = Field(pattern=r"^\d{4}\.\d{5}$")
    source: str
    certainty: Certainty
    model: str
    checkpoint: str
    total: float | None = Field(default=None, gt=0)
    compare: Literal["count", "share", "asked"] = "count"
    prompt: str
    harness: str
    command: str
    note: str = ""
    benchmarks: dict[str, Benchmark] = Field(default_factory=dict)
    rows: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _tokens_add_up(self) -> Table:
        for row in self.rows:
            if row.kept is not None and (self.total is None or row.kept > self.total):
                of = "an unknown total of" if self.total is None else f"{self.total:g}"
                raise InputError(f"{row.method}: kept {row.kept:g} of {of} visual tokens; write their total")
            if row.share is not None and self.compare != "share":
                raise InputError(f"{row.method}: a share cannot be compared as {self.compare}; write compare: share")
        return self

    def tokens(self, row: Row) -> float | None:
        """What `compare` is about: visual tokens, or their share; None where any number of them will do."""
        if self.compare == "share":
            return row.share or (row.kept or self.total or 1.0) / (self.total or 1.0)
        return self.total if row.kept is None else row.kept

    def tokens_text(self, row: Row) -> str:
        """The tokens of a row in words, such as ``64 of 576``."""
        if row.share is not None:
            return f"{100 * row.share:g} % of all"
        if row.kept is None:
            return "all" if self.total is None else f"{self.total:g}"
        return f"{row.kept:g} of {self.total:g}"


class Ledger:
    """The tables of a folder by name, the stems of their files, and all benchmarks of each."""

    def __init__(self, tables: Mapping[str, Table], shared: Mapping[str, Benchmark]) -> None:
        self.tables = dict(tables)
        self.shared = dict(shared)

    def benchmarks(self, table: str) -> dict[str, Benchmark]:
        """The columns that a table may have."""
        return {**self.shared, **self.tables[table].benchmarks}

    def of(self, pattern: str) -> Ledger:
        """The rows of methods whose names match, ``*`` standing for any letters; tables without any are left out.

        Raises:
            InputError: there are none.
        """
        found = {}
        for name, table in self.tables.items():
            rows = tuple(row for row in table.rows if fnmatch.fnmatch(row.name, pattern))
            if rows:
                found[name] = table.model_copy(update={"rows": rows})
        if not found:
            known = sorted({row.name for table in self.tables.values() for row in table.rows})
            raise InputError(f"the ledger has no figures of {pattern!r}; it has some of {', '.join(known)}")
        return Ledger(found, self.shared)

    def listed(self) -> list[dict[str, Any]]:
        """One mapping per row, with the fields of its table."""
        return [
            {
                "table": name,
                **table.model_dump(mode="json", exclude={"rows", "benchmarks", "note"}),
                **row.model_dump(mode="json"),
                "tokens": table.tokens_text(row),
                "benchmarks": {
                    each: self.benchmarks(name)[each].model_dump(mode="json", exclude_defaults=True)
                    for each in row.values
                },
            }
            for name, table in self.tables.items()
            for row in table.rows
        ]


def read_ledger(folder: Path | None = None) -> Ledger:
    """The ledger in `folder`, by default that of the checkout.

    Raises:
        InputError: there is none, or a file does not hold what it should; the line names file and key.

    >>> "fastv-llava-1.5-7b" in read_ledger().tables
    True
    """
    place = FOLDER if folder is None else folder
    if not (place / BENCHMARKS).is_file():
        where = "an installed package has none" if folder is None else f"{str(folder)!r} holds no {BENCHMARKS}"
        raise InputError(f"no ledger here: {where}; name a checkout's with --folder path/to/docs/ledger")
    shared = {name: _made(Benchmark, given, place / BENCHMARKS, name) for name, given in _read(place / BENCHMARKS)}
    tables = {}
    for path in sorted(place.glob("*.yaml")):
        if path.name != BENCHMARKS:
            tables[path.stem] = _made(Table, dict(_read(path)), path)
    ledger = Ledger(tables, shared)
    for name, table in tables.items():
        _check_columns(place / f"{name}.yaml", table, ledger)
    return ledger


def _check_columns(path: Path, table: Table, ledger: Ledger) -> None:
    known = ledger.benchmarks(path.stem)
    twice = set(table.benchmarks) & set(ledger.shared)
    if twice:
        raise InputError(f"{path}: {min(twice)!r} stands in {BENCHMARKS} already; give the column another name")
    wanted = [name for row in table.rows for name in row.values]
    for name in [*wanted, *(each for bench in table.benchmarks.values() for each in bench.over)]:
        if name not in known:
            raise InputError(f"{path}: unknown benchmark {name!r}{_near(name, known)}")


def _read(path: Path) -> list[tuple[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: expected 'key: value' lines")
    return list(content.items())


def _made(kind: type[Kind], given: Any, path: Path, key: str = "") -> Kind:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
    where = ".".join(str(part) for part in ((key,) if key else ()) + problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        raise InputError(f"{path}: {where}: {cause}" if where else f"{path}: {cause}")
    if problem["type"] == "extra_forbidden":
        models: tuple[type[Part], ...] = (Benchmark, Row, Table)
        fields = {name for model in models for name in model.model_fields}
        raise InputError(f"{path}: unknown key {where!r}{_near(str(problem['loc'][-1]), dict.fromkeys(fields))}")
    raise InputError(f"{path}: {where}: {problem['msg'].lower()}, got {problem['input']!r}")


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f". Known: {', '.join(sorted(known))}"
