"""The store: what survives a kill, who may write, what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vtc.errors import InputError
from vtc.eval.store import Store, Writer, check_writable

CONTENT = {"model": {}, "tasks": {}, "sweeps": []}


@contextlib.contextmanager
def writing(store: Store) -> Iterator[Writer]:
    """A writer of a sweep that has begun."""
    with store.writing() as writer:
        writer.save_run(CONTENT)
        yield writer


def row(doc_id: int, **changes: Any) -> dict[str, Any]:
    return {"cell": "c", "task": "t", "task_fp": "f", "repeat": 0, "doc_id": doc_id, "text": "ü"} | changes


def test_rows_come_back_and_none_is_stored_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "out")
    with writing(store) as writer:
        assert writer.add_rows([row(0), row(1)]) == 2
        assert writer.add_rows([row(1), row(1, task_fp="g"), row(1, repeat=1)]) == 2
    with store.writing() as writer:
        assert writer.add_rows([row(0), row(2)]) == 1
    assert [r["doc_id"] for r in store.rows()] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("half", ['{"cell": "c", "ta', '{"cell": "c"}', "{"])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, half: str) -> None:
    store = Store(tmp_path)
    with writing(store) as writer:
        writer.add_rows([row(0)])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(half)
    assert len(list(store.rows())) == 1
    with store.writing() as writer:
        writer.add_rows([row(1)])
    assert [r["doc_id"] for r in store.rows()] == [0, 1]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    line = json.dumps(row(0))
    for wrong, words in (
        ('{"a":', "damaged"),
        ("[1]", "a list, no mapping"),
        ('{"cell": "c"}', "it lacks 'task'"),
        (line.replace('"doc_id": 0', '"doc_id": [0]'), "'doc_id' is a list"),
    ):
        (tmp_path / "rows.jsonl").write_text(f"{line}\n{wrong}\n{line}\n")
        with pytest.raises(InputError, match=rf"rows\.jsonl: line 2 is .*{words}.*remove it and go on"):
            list(Store(tmp_path).rows())


def test_answers_without_a_run_are_nobody_s(tmp_path: Path) -> None:
    """A sweep writes run.json first; whatever lies in a folder without one is not taken into another sweep."""
    (tmp_path / "rows.jsonl").write_text("")
    with Store(tmp_path).writing():
        pass
    (tmp_path / "cells.jsonl").write_text('{"cell": "a"}\n')
    with (
        pytest.raises(InputError, match=r"holds cells\.jsonl but no run\.json.*choose another --out"),
        Store(tmp_path).writing(),
    ):
        pass


class Full:
    """A file on a disk that takes `room` more bytes."""

    def __init__(self, file: Any, room: int, truncates: bool) -> None:
        self.file, self.room, self.truncates = file, room, truncates

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(bytes(content)[: self.room])
        self.room -= written
        return int(written)

    def truncate(self, size: int) -> None:
        if not self.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("room", [0, 7, 60, 150])
def test_a_full_disk_costs_what_was_being_written_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, truncates: bool
) -> None:
    store, opened = Store(tmp_path), Path.open
    with writing(store) as writer:
        writer.add_rows([row(0)])
        with monkeypatch.context() as patch:

            def full(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
                file = opened(path, mode, *args, **more)
                return Full(file, room, truncates) if mode == "ab" else file

            patch.setattr(Path, "open", full)
            with pytest.raises(InputError, match="No space left on device; choose another --out"):
                writer.add_rows([row(1), row(2), row(3)])
        writer.add_rows([row(4)])
    found = [r["doc_id"] for r in store.rows()]
    assert found[0] == 0 and found[-1] == 4 and set(found) <= {0, 1, 2, 3, 4} and len(set(found)) == len(found)
    assert found == [0, 4] or not truncates


def test_metrics_of_a_cell_are_there_together_or_not_at_all(tmp_path: Path) -> None:
    """Cut at any byte, the file says of no cell that it is scored while one of its metrics is missing."""
    store = Store(tmp_path)
    records = [{"cell": "a", "task": "t", "task_fp": "f", "documents": 3, "metric": name, "value": 1} for name in "mno"]
    with writing(store) as writer:
        writer.add_metrics(records)
        writer.add_metrics([{**record, "cell": "b"} for record in records])
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        with store.writing():
            found = [(record["cell"], record["metric"]) for record in store.metrics()]
        assert len(found) in (0, 3, 6)


def test_cells_are_recorded_once_and_the_last_metric_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    metric = {"cell": "a", "task": "t", "task_fp": "f", "documents": 3, "metric": "m"}
    for value in (1, 2):
        about = {"version": 1, "retention": 1, "parameters": {}, "seed": 0}
        cells = [{"cell": key, "label": key, **about} for key in "aab"]
        with writing(store) as writer:
            writer.add_cells(cells)
            writer.add_metrics([{**metric, "value": value}])
            writer.add_metrics([{**metric, "documents": 4, "value": 9}])
    assert list(store.cells()) == ["a", "b"]
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 2
    assert [m["value"] for m in store.metrics()] == [2, 9]


HOLD = """
import sys, time
from pathlib import Path
from vtc.eval.store import Store
with Store(Path(sys.argv[1])).writing():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(InputError, match=f"being written by another sweep \\(process {holder.pid}\\)"),
        Store(tmp_path).writing(),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with writing(Store(tmp_path)) as writer:
        writer.add_rows([row(0)])


def test_folders_that_cannot_be_written_are_refused_and_nothing_is_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file' is not a folder; choose another --out"):
        check_writable(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="cannot write '/proc/vtc'"), Store(Path("/proc/vtc")).writing():
        pass
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_run_json_is_replaced_whole_and_missing_or_damaged_ones_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(InputError, match="holds no sweep; run `vtc sweep --out"):
        store.run()
    content = CONTENT
    with store.writing() as writer:
        writer.save_run({"a": 1})
        writer.save_run(content)
    assert store.exists and store.run() == content
    (tmp_path / "run.json").write_text('{"another": "program"}')
    with pytest.raises(InputError, match="was not written by a sweep"):
        store.run()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: not readable"):
        store.run()
