"""The record of a sweep on disk: five append-only files of JSON lines and `run.json`.

::

    run.json        the model, the tasks with their fingerprints, every sweep that wrote here, library versions
    cells.jsonl     the settings of each cell
    rows.jsonl      one answer per line; flushed to the disk after each batch of a cell
    kept.jsonl      which tokens a cell kept of one document, for some documents, see `vtc.eval.kept`
    metrics.jsonl   all metrics of one cell on one task per line; a later line replaces an earlier one
    failures.jsonl  what went wrong, where

A process that is killed, or a disk that is full, can leave half a line at the end of a file; the next write drops it.
`run.json` is written before anything else, so that nothing lies in a folder that does not say whose it is. There is
one writer at a time, held by a lock of the operating system, which ends with the process however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from vtc.errors import InputError
from vtc.eval.seen import RowKey, Seen

OFTEN = ("rows", "kept")
"""Files that every batch writes to."""
SYNC = 1.0
"""Seconds of answers that a power failure may cost; a killed process loses none, what it wrote is with the system."""

Record = dict[str, Any]


def row_key(row: Record) -> RowKey:
    """What identifies an answer: cell, task, task fingerprint, document and repeat."""
    return row["cell"], row["task"], row["task_fp"], row["doc_id"], row["repeat"]


TEXT, COUNT, SHARE, MAP, LIST = (str,), (int,), (int, float, type(None)), (dict,), (list,)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "cells": {"cell": TEXT, "label": TEXT, "version": COUNT, "parameters": MAP, "retention": SHARE, "seed": COUNT},
    "rows": {"cell": TEXT, "task": TEXT, "task_fp": TEXT, "doc_id": COUNT, "repeat": COUNT, "text": TEXT},
    "kept": {"cell": TEXT, "task": TEXT, "task_fp": TEXT, "doc_id": COUNT, "stage": TEXT, "items": LIST},
    "metrics": {"cell": TEXT, "task": TEXT, "task_fp": TEXT, "documents": COUNT, "metrics": LIST},
    "failures": {"stage": TEXT, "task": TEXT, "task_fp": TEXT, "cells": LIST, "doc_ids": LIST, "reason": TEXT},
}
"""What every line of a file has at least, and of which type."""
TASK: dict[str, tuple[type, ...]] = {
    "fingerprint": TEXT, "documents": COUNT, "repeats": COUNT, "main_metric": TEXT, "cells": LIST,
}  # fmt: skip
RUN: dict[str, tuple[type, ...]] = {"model": MAP, "tasks": MAP, "sweeps": LIST}
"""The same of a task in `run.json`, and of the whole of it."""


def misfit(record: Any, fields: dict[str, tuple[type, ...]]) -> str:
    """What keeps `record` from being one with these fields; empty if nothing does."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, no mapping"
    for name, types in fields.items():
        if name not in record:
            return f"it lacks {name!r}"
        if not isinstance(record[name], types) or isinstance(record[name], bool):
            return f"{name!r} is a {type(record[name]).__name__}"
    return ""


def read_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """The complete lines of one of the files of JSON lines, each with the byte it begins at; none if there is no file.

    Raises:
        InputError: a complete line is no record of its kind, which no interruption of a sweep can cause.
    """
    wanted = FIELDS[path.stem]
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        place = 0
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}: line {number} is damaged ({error}); remove it and go on") from error
                wrong = misfit(record, wanted)
                if wrong or not all(isinstance(entry, dict) for entry in record.get("metrics", ())):
                    wrong = wrong or "a metric is no mapping"
                    raise InputError(f"{path}: line {number} is no record of a sweep ({wrong}); remove it and go on")
                yield place, record
            place += len(line)


class Store:
    """The folder of one sweep, for reading, and inside `writing()` for appending."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether a sweep has written here."""
        return (self.folder / "run.json").is_file()

    def run(self) -> Record:
        """The content of `run.json`.

        Raises:
            InputError: there is none, or it is damaged.
        """
        path = self.folder / "run.json"
        try:
            content: Record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{str(self.folder)!r} holds no sweep; run `vtc sweep --out {self.folder}` first"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable: {error}") from error
        wrong = misfit(content, RUN) or next(filter(None, (misfit(t, TASK) for t in content["tasks"].values())), "")
        if wrong:
            raise InputError(f"{path} was not written by a sweep ({wrong}); choose another --out")
        return content

    def rows(self) -> Iterator[Record]:
        """All answers."""
        return (row for _, row in read_lines(self.folder / "rows.jsonl"))

    def index(self) -> Seen:
        """Which answers there are, and where; reads all of them once and keeps none."""
        seen = Seen()
        for place, row in read_lines(self.folder / "rows.jsonl"):
            seen.add(row_key(row), place)
        return seen

    def rows_at(self, places: Iterable[int]) -> Iterator[Record]:
        """The answers that begin at these bytes, which come from `index`."""
        with contextlib.suppress(FileNotFoundError), (self.folder / "rows.jsonl").open("rb") as file:
            for place in places:
                file.seek(place)
                yield json.loads(file.readline())

    def kept(self) -> Iterator[Record]:
        """Which tokens cells kept of the documents that are recorded."""
        return (record for _, record in read_lines(self.folder / "kept.jsonl"))

    def cells(self) -> dict[str, Record]:
        """Settings by cell key, in the order in which the cells were first swept."""
        return {record["cell"]: record for _, record in read_lines(self.folder / "cells.jsonl")}

    def metrics(self) -> list[Record]:
        """All metrics of each cell as last scored, for each task and number of documents it was scored on."""
        scored = read_lines(self.folder / "metrics.jsonl")
        last = {(each["cell"], each["task"], each["task_fp"], each["documents"]): each["metrics"] for _, each in scored}
        return [record for records in last.values() for record in records]

    def failures(self) -> list[Record]:
        """All recorded failures, the oldest first."""
        return [failure for _, failure in read_lines(self.folder / "failures.jsonl")]

    @contextlib.contextmanager
    def writing(self) -> Iterator[Writer]:
        """Become the one writer of this folder, which is created if needed.

        Raises:
            InputError: the folder cannot be written, or another process is writing it.
        """
        check_writable(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 32).decode(errors="replace").strip()
                raise InputError(
                    f"{str(self.folder)!r} is being written by another sweep (process {owner});"
                    " wait for it or choose another --out"
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            yield Writer(self)
        finally:
            os.close(lock)


class Writer:
    """Appends to a store. Made by `Store.writing`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        for name in FIELDS:
            _drop_half_line(store.folder / f"{name}.jsonl")
        if not store.exists:
            self._check_empty()
        self.seen = store.index()
        self._cells = set(store.cells())
        self._synced = time.monotonic()

    def _check_empty(self) -> None:
        """InputError if answers lie in the folder, and nothing says whose they are."""
        for name in FIELDS:
            path = self.store.folder / f"{name}.jsonl"
            if path.exists() and path.stat().st_size:
                raise InputError(
                    f"{str(self.store.folder)!r} holds {path.name} but no run.json that says of which sweep; choose "
                    "another --out, or remove it"
                )

    def save_run(self, content: Record) -> None:
        """Replace `run.json` in one step."""
        path = self.store.folder / "run.json"
        temporary = path.with_suffix(".json.new")
        with self._reporting(), temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def add_cells(self, cells: Iterable[Record]) -> None:
        """Append the cells that are not recorded yet."""
        fresh = {cell["cell"]: cell for cell in cells if cell["cell"] not in self._cells}
        self._append("cells", list(fresh.values()))
        self._cells |= set(fresh)

    def add_rows(self, rows: Iterable[Record]) -> int:
        """Append the answers that are not recorded yet and return how many those were."""
        fresh = {key: row for row in rows if (key := row_key(row)) not in self.seen}
        for key, place in zip(fresh, self._append("rows", list(fresh.values())), strict=True):
            self.seen.add(key, place)
        return len(fresh)

    def add_kept(self, records: Iterable[Record]) -> None:
        """Append what was kept for answers that are not recorded yet; `add_rows` comes after it."""
        self._append("kept", [record for record in records if row_key({**record, "repeat": 0}) not in self.seen])

    def add_metrics(self, metrics: Sequence[Record]) -> None:
        """Append all metrics of one cell on one task as one line; it replaces an earlier one on as many documents."""
        if metrics:
            about = {name: metrics[0][name] for name in ("cell", "task", "task_fp", "documents")}
            self._append("metrics", [{**about, "metrics": list(metrics)}])

    def add_failure(self, failure: Record) -> None:
        """Append one failure."""
        self._append("failures", [failure])

    def _append(self, name: str, records: list[Record]) -> list[int]:
        """Write `records` and return the byte at which each begins."""
        if not records:
            return []
        lines = [(json.dumps(record, ensure_ascii=False) + "\n").encode() for record in records]
        path = self.store.folder / f"{name}.jsonl"
        with self._reporting():
            _drop_half_line(path)  # of a write that failed, when not even that could be undone
            with path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    _write_all(file, b"".join(lines))
                    if name not in OFTEN or time.monotonic() - self._synced >= SYNC:
                        os.fsync(file.fileno())
                        self._synced = time.monotonic()
                except BaseException:
                    with contextlib.suppress(OSError):
                        file.truncate(before)
                    raise
        return list(accumulate(map(len, lines[:-1]), initial=before))

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _unwritable(self.store.folder, error) from error


def check_writable(folder: Path) -> None:
    """Raise `InputError` if `folder` cannot be created or written; creates nothing."""
    for path in (folder, *folder.absolute().parents):
        if path.exists():
            if not path.is_dir():
                raise InputError(f"cannot write {str(folder)!r}: {str(path)!r} is not a folder; choose another --out")
            if not os.access(path, os.W_OK | os.X_OK):
                raise InputError(f"cannot write {str(folder)!r}: no permission in {str(path)!r}; choose another --out")
            return


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {str(folder)!r}: {error.strerror or error}; choose another --out")


def _write_all(file: io.FileIO, content: bytes) -> None:
    """A disk that fills up takes a part and raises at the next."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _drop_half_line(path: Path, step: int = 1 << 16) -> None:
    """Cut a file behind its last line feed; looks at its end alone."""
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - step)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end != size:
            file.truncate(end)
