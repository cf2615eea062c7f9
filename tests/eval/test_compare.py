"""Two stores side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from vtc.cli.results import app
from vtc.errors import InputError
from vtc.eval.compare import compare, comparison_csv
from vtc.eval.compare_report import write_comparison
from vtc.eval.scoring import VERSION
from vtc.eval.statistics import bonett_price

WriteStore = Callable[..., Path]
CELLS = [("none", 1.0), ("a", 0.5), ("a", 0.25), ("b", 0.5)]


def hits(n: int, share: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(n) < share).astype(float).tolist()


@pytest.fixture
def two(tmp_path: Path, write_store: WriteStore) -> tuple[Path, Path]:
    """100 documents there, 80 here, one method that only one has, and a task of its own."""
    first = {"t": [hits(100, share, seed) for seed, share in enumerate((0.9, 0.8, 0.6, 0.7))]}
    second = {name: [hits(80, share, 10 + seed) for seed, share in enumerate((0.9, 0.6, 0.4))] for name in ("t", "u")}
    write_store(tmp_path / "first", CELLS, first, model="large")
    write_store(tmp_path / "second", CELLS[:3], second, model="small")
    return tmp_path / "first", tmp_path / "second"


def test_what_both_have_is_paired_on_the_documents_of_both(two: tuple[Path, Path]) -> None:
    found = compare(*two)
    assert (found.first, found.second) == ("large", "small")
    assert [(row.method, row.retention, row.n) for row in found.rows] == [
        ("none", 1.0, 80), ("a", 0.5, 80), ("a", 0.25, 80),
    ]  # fmt: skip
    row = found.rows[1]
    one, other = np.array(hits(100, 0.8, 1)[:80]), np.array(hits(80, 0.6, 11))
    up, down = int((other > one).sum()), int((other < one).sum())
    assert (row.first, row.second, row.diff) == pytest.approx((one.mean(), other.mean(), other.mean() - one.mean()))
    assert row.p == pytest.approx(stats.binomtest(up, up + down).pvalue)
    assert (row.diff_low, row.diff_high) == pytest.approx(bonett_price(up, down, 80))
    bases = np.mean(hits(100, 0.9, 0)[:80]), np.mean(hits(80, 0.9, 10))
    assert row.retained_diff == pytest.approx(100 * (other.mean() / bases[1] - one.mean() / bases[0]))
    assert row.retained_low is not None and row.retained_high is not None
    assert row.retained_low < row.retained_diff < row.retained_high
    assert (row.first_tokens, row.second_tokens) == (50.0, 50.0)
    assert [note for note in found.notes if "100 documents" in note and "80" in note]
    assert [note for note in found.notes if note.endswith("u") and "only in" in note]


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every line of cells.jsonl, or run.json."""
    path = folder / name
    records = [
        json.loads(text) for text in (path.read_text().splitlines() if name != "run.json" else [path.read_text()])
    ]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_cells_without_a_partner_are_named(two: tuple[Path, Path]) -> None:
    (note,) = [note for note in compare(*two).notes if "compared with nothing" in note]
    assert note == f"compared with nothing, only in {two[0]} (t): b at 0.5"


def test_cells_are_matched_by_what_they_are(tmp_path: Path, write_store: WriteStore) -> None:
    """A neighbour in one folder makes a name longer; a label says what a default is; both are the same cell."""
    scores = {"t": [hits(40, 0.5, seed) for seed in range(4)]}
    write_store(tmp_path / "a", [("none", 1.0), ("x", 0.5), ("y", 0.5)], {"t": scores["t"][:3]})
    write_store(tmp_path / "b", [("none", 1.0), ("x", 0.5), ("x", 0.5), ("y", 0.5)], scores)

    def told_apart(cell: dict[str, Any]) -> None:
        cell["positions"] = {"k1": "compact", "k2": "preserve"}.get(cell["cell"])
        cell["label"] = {"y": "y(seed=0)"}.get(cell["label"], cell["label"])

    rewrite(tmp_path / "b", "cells.jsonl", told_apart)
    rewrite(
        tmp_path / "a", "cells.jsonl", lambda cell: cell.update(positions="preserve" if cell["cell"] == "k1" else None)
    )
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [(row.method, row.diff) for row in found.rows] == [
        (name, pytest.approx(np.mean(scores["t"][there]) - np.mean(scores["t"][here])))
        for name, here, there in (("none", 0, 0), ("x", 1, 2), ("y", 2, 3))
    ]
    assert [note for note in found.notes if "x [positions=compact] at 0.5" in note and "only in" in note]
    assert not [note for note in found.notes if "under the same name" in note]


def test_what_else_differs_is_noted(tmp_path: Path, write_store: WriteStore) -> None:
    for name in ("a", "b"):
        write_store(tmp_path / name, CELLS[:3], {"t": [hits(40, 0.5, seed) for seed in range(3)]})

    def other_run(run: dict[str, Any]) -> None:
        run |= {"seed": 3, "video": {"frames": 8}, "generation": {"max_new_tokens": 2}}
        run["tasks"]["t"] |= {"generation": {"max_new_tokens": 2}, "prompt_profile": "qwen"}
        run["model"]["fingerprint"] = {"dtype": "float16"}

    def other_cell(cell: dict[str, Any]) -> None:
        if cell["label"] == "a":
            cell |= {"positions": "compact", "version": 2, "parameters": {"alpha": 1}}

    rewrite(tmp_path / "b", "run.json", other_run)
    rewrite(tmp_path / "b", "cells.jsonl", other_cell)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert len(found.rows) == 3
    for words in (
        f"seed 0 in {tmp_path / 'a'}, 3 in", "video settings {} in", "generation settings {} in",
        "t: generation settings {} in", "t: prompt profile 'default' in", "dtype None in",
        "another position policy under the same name: a (positions None -> compact)",
        "another version under the same name: a (version 1 -> 2)",
        "other hyper-parameters under the same name: a (alpha None -> 1)",
    ):  # fmt: skip
        assert [note for note in found.notes if note.startswith(words)], (words, found.notes)


def test_budgets_of_other_quantities_are_not_compared(tmp_path: Path, write_store: WriteStore) -> None:
    for name in ("a", "b"):
        write_store(tmp_path / name, CELLS[:2], {"t": [hits(40, 0.5, seed) for seed in range(2)]})
    rewrite(tmp_path / "b", "cells.jsonl", lambda cell: cell.update(quantity="kv") if cell["label"] == "a" else None)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [row.method for row in found.rows] == ["none"]
    assert [note.split(": ")[1] for note in found.notes if "nothing" in note] == ["a at 0.5", "a at 0.5 of kv"]


def test_a_metric_without_common_documents_is_named(two: tuple[Path, Path]) -> None:
    def unknown(line: dict[str, Any]) -> None:
        if line["task"] == "t":
            line["metrics"] += [{**line["metrics"][0], "metric": "f1", "scores": None}]

    for folder in two:
        rewrite(folder, "metrics.jsonl", unknown)
    found = compare(*two)
    assert {row.metric for row in found.rows} == {"accuracy"}
    assert [note for note in found.notes if note.startswith("t: no cell is about the same documents") and "f1" in note]


def test_a_sweep_is_equal_to_itself(two: tuple[Path, Path]) -> None:
    for row in compare(two[0], two[0]).rows:
        assert (row.diff, row.p, row.p_holm) == (0.0, 1.0, 1.0)
        assert row.diff_low is not None and row.diff_low < 0.0  # no difference seen is no certainty
        assert row.method == "none" or row.retained_diff == 0.0


def test_files_and_command(two: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(*two)
    write_comparison(found, tmp_path / "out")
    text = (tmp_path / "out" / "compare.csv").read_text()
    assert text == comparison_csv(found)
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [float(line["diff"]) for line in lines] == [row.diff for row in found.rows]
    assert "small compared with large" in (tmp_path / "out" / "compare.html").read_text()
    run = CliRunner().invoke(app, ["compare", *map(str, two), "--out", str(tmp_path / "json"), "--json"])
    assert run.exit_code == 0
    assert len(json.loads(run.stdout)["rows"]) == 3 and (tmp_path / "json" / "compare.html").exists()
    run = CliRunner().invoke(app, ["compare", *map(str, two)])
    assert run.exit_code == 0 and (two[1] / "compare.html").exists()
    assert [word for word in ("untouched", "retained", "compare.html is written", "…") if word in run.stdout] == [
        "untouched", "retained", "compare.html is written",
    ]  # fmt: skip


def test_another_task_is_refused(two: tuple[Path, Path], tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path / "other", CELLS[:1], {"v": [[1.0, 0.0]]})
    with pytest.raises(InputError, match=r"no task in common: t there, v here; sweep the same tasks"):
        compare(two[0], tmp_path / "other")


def test_a_changed_task_is_refused(two: tuple[Path, Path], tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path / "changed", CELLS[:1], {"t": [[1.0, 0.0]]}, fingerprint="g")
    with pytest.raises(InputError, match=r"task 't' is not the same in both: fingerprint f in .*, g in "):
        compare(two[0], tmp_path / "changed")


def test_another_scoring_is_refused(two: tuple[Path, Path]) -> None:
    path = two[1] / "metrics.jsonl"
    path.write_text(path.read_text().replace(f'"version": {VERSION}', '"version": 1'))
    with pytest.raises(InputError, match=rf"task 't' was scored by version {VERSION}.* and by version 1.*--rescore"):
        compare(*two)


def test_sweeps_without_a_common_cell_are_refused(tmp_path: Path, write_store: WriteStore) -> None:
    write_store(tmp_path / "a", [("x", 0.5)], {"t": [[1.0, 0.0]]})
    write_store(tmp_path / "b", [("x", 0.25)], {"t": [[1.0, 0.0]]})
    with pytest.raises(InputError, match="share no scored method"):
        compare(tmp_path / "a", tmp_path / "b")


def test_values_alone_are_compared_where_documents_are_unknown(two: tuple[Path, Path]) -> None:
    for folder in two:
        path = folder / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["metrics"][0] |= {"scores": None, "n": 7}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = compare(*two).rows
    assert len(rows) == 3
    assert all(row.p is None and row.diff_low is None for row in rows)
    assert rows[1].diff == pytest.approx(np.mean(hits(80, 0.6, 11)) - np.mean(hits(100, 0.8, 1)))
    assert rows[1].retained_diff is not None and rows[1].retained_low is None
