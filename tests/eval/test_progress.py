"""What a person sees of a sweep without a terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vtc.eval.progress import ConsoleProgress, SilentProgress, default_progress
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.settings import Stage

FAILURE: dict[str, Any] = {"task": "t", "stage": "answer", "error": "OSError", "reason": "[disk] full"}


def test_plain_lines_tell_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    clock = iter([100.0, 105.0, 140.0, 141.0])
    monkeypatch.setattr("vtc.eval.progress.time.monotonic", lambda: next(clock))
    progress = ConsoleProgress(every_seconds=30)
    progress.note("loading [model]")
    with progress:
        progress.start(100, 20)
        progress.advance(10)
        progress.advance(10)
        progress.fail(FAILURE, 30)
        progress.advance(10)
    assert stream.getvalue().splitlines() == [
        "loading [model]",
        "40 of 100 answers, 0:02:00 left",
        "failed: t, answer: OSError: [disk] full",
    ]


def test_redirecting_stderr_does_not_catch_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    progress = ConsoleProgress()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress.note("still here")
    assert stream.getvalue() == "still here\n"


def test_one_count_follows_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    clock = iter([0.0, 40.0, 41.0, 81.0])
    monkeypatch.setattr("vtc.eval.progress.time.monotonic", lambda: next(clock))
    with ConsoleProgress(every_seconds=30) as progress:
        progress.start(10, 0, "scenes")
        progress.advance(5)
        progress.start(8, 4, "steps")
        progress.advance(2, "loss 0.5")
    assert stream.getvalue().splitlines() == [
        "5 of 10 scenes, 0:00:40 left",
        "6 of 8 steps, 0:00:40 left, loss 0.5",
    ]


def test_a_training_tells_its_steps_and_its_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    clock = iter([0.0, 20.0, 40.0, 100.0, 140.0])
    monkeypatch.setattr("vtc.eval.progress.time.monotonic", lambda: next(clock))
    stage = Stage("joint", 12, rate=1e-3, warmup=1, floor=0.1, language=True)
    with Reporter(tmp_path / "log.jsonl") as reporter:
        rendered = reporter.rendering(8)
        rendered(2)
        rendered(2)
        reporter.begin(stage, 10)
        reporter.step({"answer": 0.5})
        reporter.log(stage, 11, 39.6, {"shape": 0.25})
    assert stream.getvalue().splitlines() == [
        "4 of 8 scenes, 0:00:40 left",
        "11 of 12 steps of stage joint, 0:00:40 left, answer 0.500",
        "joint 11: shape 0.250",
    ]
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    told = {"stage": "joint", "step": 11, "seconds": 40, "losses": {"answer": 0.5}, "measured": {"shape": 0.25}}
    assert json.loads(line) == told


def test_a_notebook_shows_the_bar_below_its_cell() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = (
        "from vtc.eval.progress import default_progress\n"
        "progress = default_progress()\n"
        "with progress:\n"
        "    progress.start(10, 0)\n"
        "    progress.advance(10)\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = str(notebook.cells[0].outputs) + str(notebook.metadata.get("widgets", ""))
    assert "answers" in shown and "/10" in shown


def test_a_program_is_not_disturbed() -> None:
    assert type(default_progress()) is SilentProgress
