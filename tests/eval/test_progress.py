"""What a person sees of a sweep without a terminal."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from vtc.eval.progress import ConsoleProgress, SilentProgress, default_progress

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
