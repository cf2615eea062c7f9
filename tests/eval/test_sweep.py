"""Whole sweeps of a random model over a small local task: order, resumption, failures, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

import vtc
from vtc.app import loading
from vtc.errors import InputError, UnknownName, UnsupportedMethod
from vtc.eval.progress import SilentProgress
from vtc.eval.spec import make_spec
from vtc.eval.store import Store, Writer, row_key
from vtc.eval.sweep import SweepResult, run_sweep
from vtc.method.base import ScoringCompressor, StageView
from vtc.method.registry import METHODS

WriteTask = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]
CLI = [sys.executable, "-c", "from vtc.cli.main import main; main()"]


@pytest.fixture
def sweep(model_folder: Path, task_folder: Path, tmp_path: Path) -> Callable[..., SweepResult]:
    """A function that sweeps `blobs` into `tmp_path / "out"`; settings may be changed."""

    def run(progress: SilentProgress | None = None, **settings: Any) -> SweepResult:
        defaults = {
            "model": str(model_folder),
            "methods": ["random", "vtc_cls"],
            "retentions": [1.0, 0.1],
            "tasks": ["blobs"],
            "include_path": [task_folder],
            "batch_size": 4,
            "out": tmp_path / "out",
        }
        return run_sweep(make_spec(defaults | settings), progress)

    return run


def answers(folder: Path) -> dict[Any, tuple[str, float]]:
    """All answers of a store without their timings, each asserted to be there once."""
    rows = list(Store(folder).rows())
    kept = {row_key(row): (row["text"], row["visual_tokens_kept"]) for row in rows}
    assert len(kept) == len(rows)
    return kept


class Notes(SilentProgress):
    """Keeps what the user would read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_model_that_is_partly_on_disk_answers_as_ever(
    sweep: Callable[..., SweepResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`balanced` on a machine without a GPU: what finds no room in the memory that is granted stays in the files."""
    pytest.importorskip("accelerate")
    loaded: list[Any] = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda *args, **given: loaded.append(load(*args, **given)) or loaded[-1])
    whole = sweep(device="cpu", limit=4)
    spread = sweep(device="balanced", max_memory={"cpu": "100KB"}, limit=4, out=tmp_path / "spread")
    assert [any(weight.is_meta for weight in each.model.parameters()) for each in loaded] == [False, True]
    assert answers(spread.folder) == answers(whole.folder) and not spread.failures
    with pytest.raises(InputError, match="device='cpu' is one; write device='balanced'"):
        sweep(device="cpu", max_memory={"cpu": "100KB"}, limit=4, out=tmp_path / "refused")


def test_a_sweep_answers_scores_and_reports_every_cell(sweep: Callable[..., SweepResult]) -> None:
    result = sweep()
    assert result.answered == 50 and not result.failures and not result.results.incomplete
    assert {path.name for path in result.folder.iterdir()} == {
        "run.json", "cells.jsonl", "rows.jsonl", "kept.jsonl", "metrics.jsonl", "metrics.csv", "metrics.parquet",
        "table.md", "table.tex", "figure.png", "figure.svg", "report.html", "samples", ".lock",
    }  # fmt: skip
    lines = {(line["method"], line["retention"], line["metric"]): line for line in result.results.lines}
    assert len(lines) == 5 * 3
    assert result.frame["value"].tolist() == [line["value"] for line in result.results.lines]
    assert lines["none", 1.0, "accuracy"]["visual_tokens_kept"] == 144
    assert lines["vtc_cls", 0.1, "accuracy"]["visual_tokens_kept"] == 14
    assert lines["random", 1.0, "accuracy"]["diff"] == 0.0
    order = [(row["cell"], row["doc_id"]) for row in Store(result.folder).rows()]
    first_block = [doc_id for _, doc_id in order[:20]]
    assert set(first_block) == {0, 1, 2, 3}, "sample-major: every cell answers a batch before the next batch begins"


def test_the_same_command_again_answers_nothing(sweep: Callable[..., SweepResult]) -> None:
    first = sweep()
    before = answers(first.folder)
    notes = Notes()
    again = sweep(notes)
    assert again.answered == 0 and answers(again.folder) == before
    assert "50 of 50 answers are stored already" in notes.lines
    assert again.results.lines == first.results.lines
    assert len(Store(first.folder).run()["sweeps"]) == 2


def test_a_store_grows_by_what_is_new(sweep: Callable[..., SweepResult]) -> None:
    part = sweep(methods=["random"], limit=6)
    assert part.answered == 18
    grown = sweep(limit=6)
    assert grown.answered == 12
    longer = sweep()
    assert longer.answered == 20
    assert [line["n"] for line in longer.results.lines if line["metric"] == "accuracy"] == [10] * 5
    notes = Notes()
    sweep(notes, methods=["stride"], retentions=[0.1], batch_size=5)
    assert "note: stored answers were made in batches of 4, not 5" in notes.lines
    back = sweep(methods=["random"], limit=6)
    assert back.answered == 0
    assert [line["n"] for line in back.results.lines if line["metric"] == "accuracy"] == [6] * 6


def test_grown_in_steps_or_at_once_the_answers_are_the_same(sweep: Callable[..., SweepResult], tmp_path: Path) -> None:
    for settings in ({"limit": 3, "methods": ["vtc_cls"]}, {"retentions": [0.1]}, {}):
        steps = sweep(**settings, out=tmp_path / "steps")
    at_once = sweep(out=tmp_path / "at_once")
    assert answers(steps.folder) == answers(at_once.folder)
    assert steps.results.lines != [] and {str(line) for line in steps.results.lines} == {
        str(line) for line in at_once.results.lines
    }


@dataclass(frozen=True)
class Fragile(ScoringCompressor):
    """Scores at random and breaks on its n-th batch."""

    batches: int = 1
    name: ClassVar[str] = "fragile"
    seen: ClassVar[list[int]] = []
    mended: ClassVar[bool] = False

    def score(self, view: StageView) -> Tensor:
        self.seen.append(1)
        if len(self.seen) > self.batches and not self.mended:
            raise ZeroDivisionError("attention of an empty row")
        return view.items.token.float()


@pytest.fixture
def fragile() -> Iterator[type[Fragile]]:
    Fragile.seen.clear()
    Fragile.mended = False
    vtc.register(Fragile)
    yield Fragile
    METHODS.unregister("fragile")


def test_a_failing_cell_is_recorded_and_the_others_go_on(
    sweep: Callable[..., SweepResult], fragile: type[Fragile]
) -> None:
    result = sweep(methods=["fragile", "random"], retentions=[0.1])
    (failure,) = result.failures
    assert (failure["error"], failure["doc_ids"]) == ("ZeroDivisionError", [4, 5, 6, 7])
    assert "in score" in failure["traceback"]
    (incomplete,) = result.results.incomplete
    assert (incomplete.method, incomplete.answered, incomplete.wanted) == ("fragile", 4, 10)
    assert incomplete.reason == "answer: ZeroDivisionError: attention of an empty row"
    assert {line["method"] for line in result.results.lines} == {"none", "random"}
    page = (result.folder / "report.html").read_text()
    assert "Incomplete." in page and "attention of an empty row" in page

    fragile.mended = True
    mended = sweep(methods=["fragile", "random"], retentions=[0.1])
    assert mended.answered == 6 and not mended.failures and not mended.results.incomplete
    assert "Incomplete." not in (result.folder / "report.html").read_text()


def test_broken_scoring_is_recorded_and_costs_no_answer(
    sweep: Callable[..., SweepResult], tmp_path: Path, write_task: WriteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # lmms-eval tries five times, two seconds apart
    folder = write_task(tmp_path / "tasks", "judged", documents=4, process="broken")
    write_task(folder)
    result = sweep(tasks=["judged", "blobs"], include_path=[folder], methods=["random"], retentions=[0.1])
    assert {(f["stage"], f["task"], f["error"], f["reason"]) for f in result.failures} == {
        ("score", "judged", "RuntimeError", "no judge")
    }
    assert [(entry.task, entry.answered) for entry in result.results.incomplete] == [("judged", 4), ("judged", 4)]
    assert {line["task"] for line in result.results.lines} == {"blobs"}
    assert len(answers(result.folder)) == 8 + 20


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"methods": ["vtc-cls"]}, UnknownName, "did you mean 'vtc_cls'"),
        ({"tasks": ["blob"]}, UnknownName, "did you mean 'blobs'"),
        ({"generation": {"visual_cot": True}}, InputError, "generation setting 'visual_cot' is not supported"),
        ({"model": "no/such/folder"}, vtc.VTCError, "cannot load model"),
        ({"out": Path("/proc/vtc")}, InputError, "cannot write '/proc/vtc'"),
    ],
)
def test_refusals_leave_nothing_behind(
    sweep: Callable[..., SweepResult], tmp_path: Path, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        sweep(**settings)
    assert not (tmp_path / "out").exists()


def test_a_method_the_model_cannot_serve_is_refused_before_any_answer(
    sweep: Callable[..., SweepResult], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedMethod, match="start_layer=77"):
        sweep(methods=["random", {"name": "vtc_cls", "start_layer": 77}])
    assert not (tmp_path / "out").exists()


def test_retentions_a_method_cannot_meet_are_noted_and_left_out(sweep: Callable[..., SweepResult]) -> None:
    """FastV shows every token to the first of the model's two layers here."""
    notes = Notes()
    result = sweep(notes, methods=[{"name": "fastv", "layer": 1}], retentions=[1.0, 0.9, 0.1])
    lines = {(line["method"], line["retention"]) for line in result.results.lines}
    assert lines == {("none", 1.0), ("fastv(layer=1)", 1.0), ("fastv(layer=1)", 0.9)}
    assert not result.failures and not result.results.incomplete
    (note,) = [line for line in notes.lines if line.startswith("left out")]
    assert note.startswith("left out: retention=0.1 cannot be met by 'fastv' here")


def test_a_store_of_another_sweep_is_not_mixed_in(
    sweep: Callable[..., SweepResult], tmp_path: Path, write_task: WriteTask
) -> None:
    folder = write_task(tmp_path / "tasks")
    sweep(include_path=[folder], limit=2)
    before = answers(tmp_path / "out")
    with pytest.raises(InputError, match=r"holds a sweep of .*dtype 'float32' there, 'bfloat16' here.*another --out"):
        sweep(include_path=[folder], limit=2, dtype="bfloat16")
    with pytest.raises(InputError, match="holds a sweep with seed 0, not 1; choose another --out"):
        sweep(include_path=[folder], limit=2, seed=1)
    with pytest.raises(InputError, match=r"with generation \{\}, not \{'max_new_tokens': 1\}"):
        sweep(include_path=[folder], limit=2, generation={"max_new_tokens": 1})
    (folder / "blobs.jsonl").write_text((folder / "blobs.jsonl").read_text().replace("red ring", "blue ring"))
    with pytest.raises(InputError, match="task 'blobs' as it was before its settings, code or data changed"):
        sweep(include_path=[folder], limit=2)
    assert answers(tmp_path / "out") == before and len(Store(tmp_path / "out").run()["sweeps"]) == 1


def test_one_bad_document_costs_no_other(
    sweep: Callable[..., SweepResult], tmp_path: Path, write_task: WriteTask
) -> None:
    """It is named, left out of every metric, and asked once more by every later run."""
    folder = write_task(tmp_path / "tasks")
    lines = (folder / "blobs.jsonl").read_text().splitlines()
    lines[5] = lines[5].replace("Where is", "Where is the <image> of")
    (folder / "blobs.jsonl").write_text("\n".join(lines) + "\n")
    settings: dict[str, Any] = {"include_path": [folder], "methods": ["random"], "retentions": [0.1]}
    result = sweep(**settings)
    assert [(f["stage"], f["doc_ids"]) for f in result.failures] == [("prepare", [5])]
    assert {row[3] for row in answers(result.folder)} == set(range(10)) - {5} and result.answered == 18
    assert [(entry.task, entry.doc_id) for entry in result.results.unanswered] == [("blobs", 5)]
    assert "'<image>'" in result.results.unanswered[0].reason and not result.results.incomplete
    accuracy = [line for line in result.results.lines if line["metric"] == "accuracy"]
    assert [(line["method"], line["n"]) for line in accuracy] == [("none", 9), ("random", 9)]
    again = sweep(**settings)
    assert again.answered == 0 and len(again.failures) == 1 and again.results.lines == result.results.lines
    grown = sweep(**settings | {"methods": ["random", "stride"]})
    assert grown.answered == 9 and len({line["n"] for line in grown.results.lines if line["metric"] == "accuracy"}) == 1


def test_killed_before_the_first_answer_another_seed_is_refused(
    sweep: Callable[..., SweepResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written first says whose it is, and the untouched model never goes missing."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("add_cells", "save_run"):
        with monkeypatch.context() as patch:
            patch.setattr(Writer, name, killed)
            with pytest.raises(KeyboardInterrupt):
                sweep(limit=2)
    assert Store(tmp_path / "out").exists
    with pytest.raises(InputError, match="holds a sweep with seed 0, not 1"):
        sweep(limit=2, seed=1)
    result = sweep(limit=2)
    assert {line["method"] for line in result.results.lines} == {"none", "random", "vtc_cls"}


def test_sampling_tasks_resume_to_the_same_draws(
    sweep: Callable[..., SweepResult], tmp_path: Path, write_task: WriteTask
) -> None:
    hot = "generation_kwargs: {max_new_tokens: 3, temperature: 3.0}\nrepeats: 2"
    folder = write_task(tmp_path / "tasks", "hot", generation=hot)
    settings = {"tasks": ["hot"], "include_path": [folder], "methods": ["random"], "retentions": [0.1]}
    sweep(**settings, limit=8)
    grown, at_once = sweep(**settings), sweep(**settings, out=tmp_path / "at_once")
    assert answers(grown.folder) == answers(at_once.folder)
    assert len(answers(grown.folder)) == 2 * 2 * 10
    texts = {key[3:]: text for key, (text, _) in answers(grown.folder).items()}
    assert any(texts[doc_id, 0] != texts[doc_id, 1] for doc_id in range(10))


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_nothing_is_lost_or_doubled(
    sweep: Callable[..., SweepResult], model_folder: Path, tmp_path: Path, write_task: WriteTask, command: Command
) -> None:
    folder = write_task(tmp_path / "tasks", documents=80)
    settings = {"include_path": [folder], "batch_size": 2}
    words = [
        "sweep", "--model", str(model_folder), "--methods", "random,vtc_cls", "--retentions", "1.0,0.1",
        "--tasks", "blobs", "--include-path", str(folder), "--batch-size", "2", "--out", str(tmp_path / "killed"),
    ]  # fmt: skip
    rows = tmp_path / "killed" / "rows.jsonl"
    process = subprocess.Popen([*CLI, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not rows.exists() or len(rows.read_bytes().splitlines()) < 30):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stored = len(answers(tmp_path / "killed"))
    assert 30 <= stored < 400, "the kill has to hit the middle"
    with rows.open("a") as file:
        file.write('{"cell": "half a li')

    code, _, said = command(*words)
    assert code == 0 and f"{stored} of 400 answers are stored already" in said
    whole = sweep(**settings, out=tmp_path / "whole")
    assert answers(tmp_path / "killed") == answers(whole.folder)
    assert len(answers(whole.folder)) == 400
    assert (tmp_path / "killed" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
