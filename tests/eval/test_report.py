"""Tables, figure and report from a store that is written by hand."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from vtc.errors import InputError
from vtc.eval import charts, curves
from vtc.eval.columns import NAMES
from vtc.eval.files import frame
from vtc.eval.files import latex as latex_of
from vtc.eval.files import markdown as markdown_of
from vtc.eval.report import write_report
from vtc.eval.results import Results, _series_names, json_summary, read_results, to_csv
from vtc.eval.store import Store
from vtc.eval.tables import console_table, console_title, grid, short_names

SHORT = (
    "random", "stride", "pool", "vtc_cls", "globalcom2", "hiprune", "todre", "atp_training_free", "mustdrop", "aim",
    "vqtoken_codebook",
)  # fmt: skip
CELLS = {
    "k0": ("none", 1.0, {}),
    "k1": ("random", 0.5, {"seed": 0}),
    "k2": ("random", 0.25, {"seed": 0}),
    "k3": ("pool <b>", 0.5, {}),
    "k4": ("own", None, {}),
}


def cell(key: str, **changes: Any) -> dict[str, Any]:
    label, retention, parameters = CELLS[key]
    return {
        "cell": key, "label": label, "method": label, "version": 1, "parameters": parameters, "retention": retention,
        "positions": "compact", "seed": 0, "generation": {}, "model": {"dtype": "float32"},
    } | changes  # fmt: skip


def metric(key: str, value: float, **changes: Any) -> dict[str, Any]:
    paired = {
        "diff": value - 0.9,
        "low": -0.3,
        "high": 0.1,
        "p": value**3 / 10,
        "how": "McNemar",
        "n_up": 1,
        "n_down": 2,
    }
    return {
        "cell": key, "task": "t", "task_fp": "f", "documents": 4, "metric": "accuracy", "value": value, "ci_low": 0.1,
        "ci_high": 0.95, "ci_method": "Wilson", "n": 4, "higher_is_better": True, "visual_tokens_in": 144.0,
        "visual_tokens_kept": 144.0 * (CELLS[key][1] or 0.3), "scores": None,
        "paired": None if key == "k0" else paired,
    } | changes  # fmt: skip


def run(**changes: Any) -> dict[str, Any]:
    task = {
        "fingerprint": "f", "version": "1", "documents": 4, "of": 9, "repeats": 1, "main_metric": "accuracy",
        "cluster_key": None, "prompt_profile": "default", "generation": {"max_new_tokens": 3}, "until": [],
        "cells": list(CELLS),
    }  # fmt: skip
    spec = {"methods": [{"name": "random", "seed": 1}, {"name": "pool"}], "retentions": [0.5, 0.25], "limit": None}
    sweep = {"started": "2026-01-01T00:00:00+00:00", "spec": spec, "versions": {"torch": "2.15"}, "device": "cpu"}
    return {
        "model": {"name": "tiny", "fingerprint": {"name": "tiny", "dtype": "float32"}},
        "seed": 0, "generation": {}, "tasks": {"t": task}, "sweeps": [sweep],
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with a baseline, three cells, and one more that failed half way."""
    rows = [
        {"cell": key, "task": "t", "task_fp": "f", "doc_id": doc_id, "repeat": 0, "text": "red"}
        for key in CELLS
        for doc_id in range(4 if key != "k3" else 2)
    ]
    failure = {
        "stage": "answer", "task": "t", "task_fp": "f", "cells": ["k3"], "doc_ids": [2], "error": "OSError",
        "reason": "<disk> full",
    }  # fmt: skip
    with Store(tmp_path).writing() as writer:
        writer.save_run(run())
        writer.add_cells(cell(key) for key in CELLS)
        writer.add_rows(rows)
        writer.add_failure(failure)
        words = {"k1": 0.75, "k0": 1.0}
        for key, value in (("k0", 0.9), ("k1", 0.8), ("k2", 0.4), ("k4", 0.7)):
            more = [metric(key, words[key], metric="words", n=2)] if key in words else []
            writer.add_metrics([metric(key, value), *more])
        writer.add_metrics([metric("k2", 0.1, documents=2)])
        writer.add_metrics([metric("k2", 0.1, task_fp="old")])
    return tmp_path


def test_an_older_cell_without_a_hyper_parameter_keeps_its_name() -> None:
    """Methods grow: of cells of one label the new one says what is new, and none says nothing in brackets."""
    cells = {"k2": cell("k2", parameters={"seed": 0, "schedule": None}), "k1": cell("k2")}
    assert _series_names(cells) == {"k2": "random [schedule=None]", "k1": "random"}


def test_the_csv_has_one_line_per_metric_of_each_cell(folder: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(read_results(folder)))))
    assert tuple(lines[0]) == NAMES
    assert NAMES[:12] == (
        "model", "task", "metric", "method", "retention", "keep", "value", "ci_low", "ci_high", "n", "visual_tokens_in",
        "visual_tokens_kept",
    )  # fmt: skip
    assert [(line["method"], line["retention"], line["metric"], line["value"]) for line in lines] == [
        ("none", "1.0", "accuracy", "0.9"),
        ("none", "1.0", "words", "1.0"),
        ("random", "0.5", "accuracy", "0.8"),
        ("random", "0.5", "words", "0.75"),
        ("random", "0.25", "accuracy", "0.4"),
        ("own", "", "accuracy", "0.7"),
    ]
    assert lines[0]["diff"] == "" and float(lines[2]["diff"]) == pytest.approx(-0.1)
    assert (lines[2]["positions"], lines[2]["parameters"], lines[2]["seed"]) == ("compact", '{"seed": 0}', "0")


def test_scores_of_cells_whose_answers_are_lost_are_not_shown(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    scores = {"t": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]}
    folder = write_store(tmp_path / "cut", [("none", 1.0), ("a", 0.5), ("b", 0.5)], scores)
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:3]))
    found = read_results(folder)
    assert [line["method"] for line in found.lines] == ["none"]
    assert [(entry.method, entry.answered, entry.wanted) for entry in found.incomplete] == [("a", 1, 2), ("b", 0, 2)]
    (folder / "rows.jsonl").unlink()  # as an archive has it
    assert len(read_results(folder).lines) == 3


def test_what_is_incomplete_is_said_with_its_reason(folder: Path) -> None:
    (entry,) = read_results(folder).incomplete
    assert vars(entry) == {
        "task": "t", "method": "pool <b>", "retention": 0.5, "answered": 2, "wanted": 4,
        "reason": "answer: OSError: <disk> full",
    }  # fmt: skip


def test_a_grid_shows_shares_in_percent_and_other_numbers_as_they_are(folder: Path) -> None:
    results = read_results(folder)
    data = grid(results, "t", "accuracy")
    assert (list(data.retentions), list(data.methods)) == ([0.5, 0.25, None], ["random", "own"])
    assert (data.show(0.5), data.show(None)) == ("50.0", "-")
    assert (data.show_diff(-0.0), data.show_diff(0.25), data.show_diff(None)) == ("+0.0", "+25.0", "-")
    big = Results(results.run, [line | {"value": 1859.871} for line in results.lines], [])
    assert grid(big, "t", "accuracy").show(1859.871) == "1860"


def test_the_console_table_shows_values_marks_and_achieved_tokens(folder: Path) -> None:
    results = read_results(folder)
    console = Console(file=io.StringIO(), width=100)
    console.print(console_table(results, "t"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"untouched +│ 90.0 144", text)
    assert re.search(r"random +│ +80.0 72 │ 40.0\* 36 │ +-", text)
    assert re.search(r"own +│ +- │ +- │ 70.0 43.2", text)
    assert console_title(results, "t") == "t: accuracy (%), 4 questions, tiny"


RETENTIONS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.05)


def many(methods: Sequence[str], retentions: Sequence[float | None] = RETENTIONS) -> Results:
    """Every method at every retention, and the untouched model."""
    line = {
        "task": "t",
        "metric": "accuracy",
        "ci_low": 0.1,
        "ci_high": 0.9,
        "n": 720,
        "p": 0.01,
        "p_holm": 0.01,
        "value": 1.0,
        "higher_is_better": True,
        "parameters": "{}",
        "positions": None,
        "seed": 0,
    }
    cells: list[tuple[str, float | None]] = [("none", 1.0), *((m, r) for m in methods for r in retentions)]
    lines = [
        {**line, "method": m, "retention": r, "visual_tokens_in": 144.0, "visual_tokens_kept": 144.0 * (r or 0.3)}
        for m, r in cells
    ]
    return Results(run(), lines, [])


THIRTEEN = [*SHORT, "vqtoken(weights=vqtoken-tiny-llava)", "[red]own[/red]"]


def printed(results: Results, width: int) -> list[str]:
    stream = io.StringIO()
    table = console_table(results, "t", width)
    Console(file=stream, width=width).print(table, crop=False, no_wrap=True, overflow="ignore")
    return stream.getvalue().splitlines()


def test_thirteen_methods_fit_eighty_columns_with_their_whole_names() -> None:
    lines = printed(many(THIRTEEN), 80)
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    names = [line.split()[0] for line in lines if line[:1].strip() and line[0] not in "─━"]
    assert names == ["method", "untouched", *(name.split("(")[0] for name in THIRTEEN)]
    assert sum("100.0*" in line for line in lines) == 13
    assert any(line.split() == ["144", "72", "47.52", "31.68", "15.84", "7.2"] for line in lines)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_no_table_loses_anything(width: int) -> None:
    text = "\n".join(printed(many(THIRTEEN, [r / 20 for r in range(1, 20)]), width))
    assert "…" not in text and text.count("100.0*") == 13 * 19
    assert all(name.split("(")[0] in text for name in THIRTEEN)


def test_names_that_alone_do_not_tell_methods_apart_stay_whole() -> None:
    names = ["random(seed=1)", "random(seed=2)", "a@0.5+b(c=1)"]
    assert list(short_names(names).values()) == names


@pytest.mark.parametrize("retentions", [RETENTIONS, [None]])
def test_names_are_drawn_as_they_are(retentions: Sequence[float | None]) -> None:
    svg = charts.picture(curves.figure(many(["own$x_^$", "[red]"], retentions)), "svg").decode()
    assert "own$x_^$" in svg and "[red]" in svg


def test_methods_that_differ_only_in_settings_get_different_names(folder: Path) -> None:
    with Store(folder).writing() as writer:
        writer.add_cells([cell("k1", cell="k5", positions="preserve")])
        writer.add_metrics([metric("k1", 0.6, cell="k5")])
    names = [line["method"] for line in read_results(folder).lines if line["retention"] == 0.5]
    assert names == ["random [positions=compact]"] * 2 + ["random [positions=preserve]"]


def test_documents_that_no_cell_could_be_asked_about_are_named(folder: Path) -> None:
    """They lack in every cell alike, so the cells are complete without them."""
    record = run()
    record["tasks"]["t"]["documents"] = 5
    failure = {
        "stage": "prepare", "task": "t", "task_fp": "f", "cells": list(CELLS), "doc_ids": [4], "error": "InputError",
        "reason": "picture <b> is broken",
    }  # fmt: skip
    with Store(folder).writing() as writer:
        writer.save_run(record)
        writer.add_failure(failure)
        for key in ("k0", "k1"):
            writer.add_metrics([metric(key, 0.5, documents=5, n=4)])
    results = write_report(folder)
    (lost,) = results.unanswered
    assert vars(lost) == {"task": "t", "doc_id": 4, "reason": "InputError: picture <b> is broken"}
    assert {entry.method: (entry.answered, entry.wanted) for entry in results.incomplete}["pool <b>"] == (2, 4)
    assert not {"none", "random"} & {entry.method for entry in results.incomplete if entry.retention in (1.0, 0.5)}
    page = (folder / "report.html").read_text()
    assert "Questions left out." in page and "picture &lt;b&gt; is broken" in page
    assert json_summary(results)["unanswered"] == [vars(lost)]


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-x", "@sum", "\tx"])
def test_a_name_is_no_formula_in_a_spreadsheet(folder: Path, name: str) -> None:
    with Store(folder).writing() as writer:
        writer.add_cells([cell("k1", cell="k6", label=name)])
        writer.add_metrics([metric("k1", 0.6, cell="k6")])
    text = to_csv(read_results(folder))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert f"'{name}" in {line["method"] for line in lines}
    assert {line["diff"] for line in lines} >= {"-0.5"}  # numbers stay numbers


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_stands_alone(folder: Path) -> None:
    write_report(folder)
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert [source for source in page.loaded if source[:1] != "#"] == ["data:,"]
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert "url(" not in markup and "@import" not in markup and "http" not in markup
    shown = ("random(seed 1), pool", "&lt;disk&gt; full", "pool &lt;b&gt;", "72 of 144", "Wilson", "2.15")
    assert [words for words in shown if words not in text] == []
    assert [name for name in NAMES if f">{name}</th>" not in text] == []
    assert "Scored differently." in text and "by scoring version 0 are shown as they were scored" in text
    with Image.open(folder / "figure.png") as image:
        assert image.width > 600


FILES = (
    "metrics.csv", "metrics.parquet", "table.md", "table.tex", "figure.png", "figure.svg", "report.html",
)  # fmt: skip


def test_a_redrawn_report_is_the_same(folder: Path) -> None:
    def drawn() -> dict[str, bytes]:
        write_report(folder)
        return {name: (folder / name).read_bytes() for name in FILES}

    assert drawn() == drawn()
    assert not list(folder.glob("*.new"))


def test_several_tasks_get_several_panels_and_an_empty_one_says_so(folder: Path) -> None:
    one = write_report(folder)
    record = run()
    record["tasks"] = {name: record["tasks"]["t"] for name in ("t", "u", "v", "w")}
    with Store(folder).writing() as writer:
        writer.save_run(record)
    four = write_report(folder)
    assert (folder / "figure.svg").read_text().count("no cell is complete") == 3
    assert len(four.incomplete) == len(one.incomplete) + 3 * 5
    assert "No cell is complete." in (folder / "report.html").read_text()


def test_tables_for_papers(folder: Path) -> None:
    write_report(folder)
    markdown, latex = (folder / "table.md").read_text(), (folder / "table.tex").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    assert rows[0] == ["method", "0.5", "0.25", "own"]
    assert rows[2:] == [["untouched", "90.0", "", ""], ["random", "80.0", "40.0*", "-"], ["own", "-", "-", "70.0"]]
    assert r"random & 80.0 & 40.0* & - \\" in latex and r"\toprule" in latex
    assert "Holm-corrected" in markdown and latex.startswith("% t, accuracy (%), 4 questions, tiny")


def test_latex_and_markdown_take_names_as_they_are() -> None:
    results = many(["a_b|c", "50%"], [0.5])
    assert r"a\_b|c" in latex_of(results) and r"50\% &" in latex_of(results)
    assert r"a_b\|c" in markdown_of(results)


def test_the_data_frame_is_the_csv_with_types(folder: Path) -> None:
    results = write_report(folder)
    made = frame(results)
    read = pd.read_csv(folder / "metrics.csv")
    assert list(made.columns) == list(read.columns) == list(NAMES)
    assert made["value"].tolist() == pytest.approx(read["value"].tolist())
    assert made["retention"].isna().tolist() == read["retention"].isna().tolist()
    assert str(made["n"].dtype) == "Int64" and str(made["higher_is_better"].dtype) == "boolean"
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "metrics.parquet"), made)


def test_numbers_of_tokens_stand_behind_retentions(folder: Path) -> None:
    with Store(folder).writing() as writer:
        writer.add_cells([cell("k1", cell=f"k{count}", retention=None, keep=count) for count in (16, 64)])
        writer.add_metrics([metric("k1", 0.5, cell="k16")])
        writer.add_metrics([metric("k1", 0.6, cell="k64")])
    data = grid(read_results(folder), "t", "accuracy")
    assert list(data.retentions) == [0.5, 0.25, "64 tokens", "16 tokens", None]
    assert data.entries["random", "64 tokens"]["value"] == 0.6


def test_json_values(folder: Path) -> None:
    summary = json_summary(read_results(folder))
    assert summary["model"]["name"] == "tiny" and len(summary["metrics"]) == 6
    assert summary["incomplete"][0]["wanted"] == 4


def test_results_without_their_cell_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "store")
    cells = tmp_path / "store" / "cells.jsonl"
    first, *others = cells.read_text().splitlines()
    cells.write_text("\n".join(others) + "\n")
    gone = json.loads(first)["cell"]
    with pytest.raises(InputError, match=rf"results of the cell {gone}, which cells\.jsonl beside it lacks; sweep it"):
        read_results(tmp_path / "store")


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no sweep"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
