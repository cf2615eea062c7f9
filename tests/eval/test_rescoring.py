"""Metrics are derived from the answers: stores of older scorings are read, said to be so, and computed again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtc.errors import InputError, UnknownName
from vtc.eval import columns, scoring
from vtc.eval.columns import COLUMNS, Column, Line
from vtc.eval.progress import SilentProgress
from vtc.eval.rescoring import rescore, score_store
from vtc.eval.results import read_results, to_csv
from vtc.eval.store import Store

WriteTask = Callable[..., Path]
NOW = scoring.scoring_of("f")
GUESSES = {
    "k0": ["red", "left"] * 3,
    "k1": ["red", "left", "red", "right", "blue", "left"],
    "k2": ["red", "up", "red", "right", "blue", "left"],
}
"""The untouched model is always right, k1 in four of six, k2 in three."""


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def old_metric(task: Any, key: str, value: float, **changes: Any) -> dict[str, Any]:
    """A metric as stores of the first format hold it: no scoring, the comparison under "paired"."""
    paired = {"diff": value - 1, "low": -0.9, "high": 0.2, "p": 0.5, "how": "old test", "n_up": 0, "n_down": 9}
    return {
        "cell": key, "task": "blobs", "task_fp": task.fingerprint, "documents": 6, "metric": "accuracy", "value": value,
        "ci_low": 0.0, "ci_high": 1.0, "ci_method": "old interval", "n": 6, "higher_is_better": True,
        "visual_tokens_in": 144.0, "visual_tokens_kept": 72.0, "scores": None, "left_out": [],
        "paired": None if key == "k0" else paired,
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, blobs: Any, task_folder: Path) -> Path:
    """A store of the first format: three cells with six answers each, and metrics that no scoring of today gives."""
    settings = {
        "fingerprint": blobs.fingerprint, "version": "2.0", "documents": 6, "of": 10, "repeats": 1,
        "main_metric": "accuracy", "cluster_key": "scene", "prompt_profile": "default", "generation": {}, "until": [],
        "cells": list(GUESSES),
    }  # fmt: skip
    sweep = {
        "started": "", "spec": {"include_path": [str(task_folder), "no/such/folder"]}, "versions": {}, "device": "cpu",
    }  # fmt: skip
    run = {"model": {"name": "m", "fingerprint": {}}, "seed": 0, "tasks": {"blobs": settings}, "sweeps": [sweep]}
    names = {"k0": "none", "k1": "random", "k2": "stride"}
    with Store(tmp_path / "old").writing() as writer:
        writer.save_run(run)
        writer.add_cells(
            {"cell": key, "label": names[key], "method": names[key], "version": 1, "parameters": {}, "seed": 0}
            | {"retention": 0.5 if key != "k0" else 1.0}
            for key in GUESSES
        )
        writer.add_rows(
            {"cell": key, "task": "blobs", "task_fp": blobs.fingerprint, "doc_id": doc_id, "repeat": 0, "text": text}
            | {"output_tokens": doc_id, "visual_tokens_in": 144, "visual_tokens_kept": 36.0}
            for key, texts in GUESSES.items()
            for doc_id, text in enumerate(texts)
        )
        for key in GUESSES:
            writer.add_metrics([old_metric(blobs, key, 0.9)])
    return tmp_path / "old"


def by_cell(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["cell"]: line for line in read_results(folder).select("blobs", "accuracy")}


def test_an_old_store_shows_every_column(folder: Path) -> None:
    """New ones are computed from the answers, or from the comparison as it was stored then."""
    line = by_cell(folder)["k1"]
    assert list(line) == [column.name for column in COLUMNS]
    assert (line["value"], line["diff"], line["n_down"], line["diff_method"]) == (
        0.9,
        pytest.approx(-0.1),
        9,
        "old test",
    )
    assert (line["output_tokens"], line["positions"], line["scoring"]) == (2.5, None, "version 0")
    assert to_csv(read_results(folder)).splitlines()[0].split(",") == list(line)


def test_answers_that_do_not_tell_leave_a_column_empty(folder: Path, blobs: Any) -> None:
    with Store(folder).writing() as writer:
        writer.add_metrics([old_metric(blobs, "k1", 0.9, n=3)])  # of which three documents, nobody knows
        writer.add_metrics([old_metric(blobs, "k2", 0.9, n=2, scores={"1": 1.0, "3": 0.0})])
    lines = by_cell(folder)
    assert (lines["k1"]["output_tokens"], lines["k2"]["output_tokens"]) == (None, 2.0)


def test_a_store_of_another_scoring_says_so(folder: Path) -> None:
    results = read_results(folder)
    (entry,) = results.outdated
    assert (entry.scoring, entry.cells, entry.shown) == ("version 0", 3, True)
    assert f"by scoring version 0 are shown as they were scored; this is version {scoring.VERSION}" in str(entry)
    assert "`vtc report --rescore`" in str(entry) and not results.incomplete


def test_rescoring_needs_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("vtc.app.loading.load")
    notes = Notes()
    assert rescore(folder, progress=notes) == []
    assert notes.lines == [
        f"note: blobs: metrics of scoring version 0 are computed again by {columns.scoring_text(NOW)}"
    ]
    lines = by_cell(folder)
    assert [line["value"] for line in lines.values()] == [1.0, pytest.approx(4 / 6), 0.5]
    assert (lines["k0"]["diff"], lines["k2"]["diff"]) == (None, -0.5)
    assert (lines["k2"]["n_up"], lines["k2"]["n_down"], lines["k2"]["visual_tokens_kept"]) == (0, 3, 36.0)
    assert {line["scoring"] for line in lines.values()} == {columns.scoring_text(NOW)}
    assert read_results(folder).outdated == []


def test_two_scorings_are_never_in_one_table(folder: Path, blobs: Any) -> None:
    rescore(folder)
    with Store(folder).writing() as writer:
        writer.add_metrics([old_metric(blobs, "k1", 0.9)])
    results = read_results(folder)
    assert {line["cell"] for line in results.lines} == {"k0", "k2"}
    (entry,), (lacking,) = results.outdated, results.incomplete
    assert (entry.cells, entry.shown) == (1, False) and "are left out beside those of this one" in str(entry)
    assert (lacking.method, lacking.answered, lacking.reason) == (
        "random",
        6,
        "not scored by this version yet, which `vtc report --rescore` does",
    )

    with Store(folder).writing() as writer:  # what every sweep ends with
        before = (folder / "metrics.jsonl").read_text().count("\n")
        assert score_store(blobs, 6, "k0", writer, notes := Notes()) == []
        assert score_store(blobs, 6, "k0", writer, notes) == []
    assert (folder / "metrics.jsonl").read_text().count("\n") == before + 2, (
        "the one cell once, and what it is compared with"
    )
    assert len(notes.lines) == 1 and by_cell(folder)["k1"]["value"] == pytest.approx(4 / 6)
    assert read_results(folder).outdated == []


@pytest.mark.parametrize("what", ["version", "lmms-eval"])
def test_a_raised_version_and_another_lmms_eval_make_metrics_old(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    rescore(folder)
    if what == "version":
        monkeypatch.setattr(scoring, "VERSION", scoring.VERSION + 1)
    else:
        monkeypatch.setattr(scoring.metadata, "version", lambda package: "99.0")
    (entry,) = read_results(folder).outdated
    assert entry.scoring == columns.scoring_text(NOW) != entry.now
    rescore(folder)
    assert read_results(folder).outdated == []


def test_a_task_that_changed_is_not_scored_again(folder: Path, tmp_path: Path, write_task: WriteTask) -> None:
    """Its questions may be others; the folder given goes before the one that was swept."""
    with pytest.raises(InputError, match=r"task 'blobs' has changed since .* was swept.*--include-path"):
        rescore(folder, [write_task(tmp_path / "changed", documents=8)])
    assert {line["value"] for line in by_cell(folder).values()} == {0.9}


def test_a_task_that_is_gone_is_named(folder: Path) -> None:
    store = Store(folder)
    run = store.run()
    run["sweeps"][0]["spec"] = {}
    with store.writing() as writer:
        writer.save_run(run)
    with pytest.raises(UnknownName, match=r"unknown task 'blobs'.*give the folder that holds it with --include-path"):
        rescore(folder)


def test_a_new_column_is_one_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored by the next scoring and shown everywhere; stores without it show its default."""
    kept = Column("margin", float, "width of the interval", scored=lambda m: 7.5, since=2, default=-1.0)
    monkeypatch.setattr(columns, "COLUMNS", (*COLUMNS, kept))
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    assert by_cell(folder)["k1"]["margin"] == -1.0
    rescore(copy)
    assert by_cell(copy)["k1"]["margin"] == 7.5
    assert "| `margin` | float | 2 | width of the interval |" in columns.column_page()


def test_a_value_of_the_wrong_type_is_named() -> None:
    number = next(column for column in COLUMNS if column.name == "value")
    line = Line({}, {}, "random", {"metric": "accuracy", "cell": "k1", "value": "0.5"}, list)
    with pytest.raises(
        InputError, match=r"metric 'accuracy' of cell k1: 'value' is '0\.5', no float; remove that line"
    ):
        number.value(line)
    whole = dataclasses.replace(line, record={**line.record, "value": 1})
    assert number.value(whole) == 1


def test_the_order_of_the_answers_changes_nothing(folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """Workers end in any order, and a sum of the same numbers in another order is another sum."""
    path = folder / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "visual_tokens_kept": 10.0 ** (row["doc_id"] - 9) / 3} for row in rows]
    tables = []
    for order in (rows, rows[::-1]):
        path.write_text("".join(json.dumps(row) + "\n" for row in order))
        rescore(folder, [task_folder])
        tables.append(to_csv(read_results(folder)))
    assert sum(row["visual_tokens_kept"] for row in rows[:6]) != sum(row["visual_tokens_kept"] for row in rows[5::-1])
    assert tables[0] == tables[1]
