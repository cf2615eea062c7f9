"""The store: what survives a kill, who may write, what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vtc.errors import InputError
from vtc.eval.store import Store, check_writable


def row(doc_id: int, **changes: Any) -> dict[str, Any]:
    return {"cell": "c", "task": "t", "task_fp": "f", "repeat": 0, "doc_id": doc_id, "text": "ü"} | changes


def test_rows_come_back_and_none_is_stored_twice(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "out")
    with store.writing() as writer:
        assert writer.add_rows([row(0), row(1)]) == 2
        assert writer.add_rows([row(1), row(1, task_fp="g"), row(1, repeat=1)]) == 2
    with store.writing() as writer:
        assert writer.add_rows([row(0), row(2)]) == 1
    assert [r["doc_id"] for r in store.rows()] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("half", ['{"cell": "c", "ta', '{"cell": "c"}', "{"])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, half: str) -> None:
    store = Store(tmp_path)
    with store.writing() as writer:
        writer.add_rows([row(0)])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(half)
    assert len(list(store.rows())) == 1
    with store.writing() as writer:
        writer.add_rows([row(1)])
    assert [r["doc_id"] for r in store.rows()] == [0, 1]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a":\n{"a": 2}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2 is damaged"):
        list(Store(tmp_path).rows())


def test_cells_are_recorded_once_and_the_last_metric_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    metric = {"cell": "a", "task": "t", "task_fp": "f", "documents": 3, "metric": "m"}
    for value in (1, 2):
        with store.writing() as writer:
            writer.add_cells([{"cell": "a"}, {"cell": "a"}, {"cell": "b"}])
            writer.add_metrics([{**metric, "value": value}, {**metric, "documents": 4, "value": 9}])
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
    with Store(tmp_path).writing() as writer:
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
    content = {"model": {}, "tasks": {}, "sweeps": []}
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
