"""What people expect of any command line: completion, NO_COLOR, --quiet, whole names in narrow windows, a logger."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import vtc
from vtc import adapters
from vtc.app.doctor import examine
from vtc.app.loading import load
from vtc.app.talk import LOG, show, talking
from vtc.cli.main import app, main
from vtc.cost.published import PUBLISHED
from vtc.errors import VTCError
from vtc.eval.progress import ConsoleProgress
from vtc.eval.suite import BENCHMARKS
from vtc.method.registry import METHODS


@pytest.fixture(autouse=True)
def quiet_again() -> Any:
    """The logger is the process's: each test leaves it as it was."""
    before = LOG.level, LOG.propagate, list(LOG.handlers)
    yield
    LOG.setLevel(before[0])
    LOG.propagate, LOG.handlers = before[1:]


# --- names in a window of 80 columns
LISTS = {
    "methods": lambda: vtc.list_methods(),
    "models": lambda: [*adapters.families(), *adapters.encoder_families()],
    "tasks": lambda: ["tiny_image", "vtc_video", *(benchmark.name for benchmark in BENCHMARKS)],
    "cost --models": lambda: list(PUBLISHED),
    "cost llava-1.5-7b": lambda: ["ffn3_visual", "llmviewer"],
    "ledger": lambda: ["globalcom2", "vqtoken", "mustdrop", "LLaVA-OneVision-7B"],
    "doctor": lambda: ["visual-token-compression", "flash_attention_2", "notebooks"],
}


@pytest.mark.parametrize("words", LISTS)
def test_lists_name_everything_in_80_columns(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert not app(args=words.split(), standalone_mode=False)
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert [name for name in LISTS[words]() if name not in shown] == []


# --- colours, completion
@pytest.mark.parametrize("plain", [False, True])
def test_no_color_is_respected(
    plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    app(args=["methods", "--long", "fastv"], standalone_mode=False)
    app(args=["methods", "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "\x1b[1m" in shown
    assert (re.search(r"\x1b\[[\d;]*3\d", shown) is None) == plain


def test_completion_can_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit) as ended:
        app(args=["--install-completion", "bash"], prog_name="vtc")
    assert ended.value.code == 0
    (script,) = tmp_path.rglob("*.sh")
    assert str(script) in (tmp_path / ".bashrc").read_text()
    assert "_VTC_COMPLETE=complete_bash" in script.read_text()
    capsys.readouterr()
    for name, value in {"_VTC_COMPLETE": "complete_bash", "COMP_WORDS": "vtc ge", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        app(args=[], prog_name="vtc")
    assert capsys.readouterr().out.split() == ["generate"]


# --- quiet, and the logger
MINE = """import vtc


@vtc.register
class QuietMine(vtc.ScoringCompressor):
    def score(self, view):
        return -view.items.token.float()
"""


def test_quiet_leaves_notes_out_and_results_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine := tmp_path / "quiet_mine.py").write_text(MINE)
    for flags, said in (([], True), (["--quiet"], False)):
        monkeypatch.setattr(sys, "argv", ["vtc", "methods", "--plugin", str(mine), "quiet_mine", *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        out, error = capsys.readouterr()
        assert (ended.value.code, "quiet_mine" in out, "plugin" in error) == (0, True, said)
    METHODS.unregister("quiet_mine")


def test_quiet_still_tells_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    show(logging.WARNING)
    assert not talking()
    progress = ConsoleProgress(every_seconds=0)
    progress.note("not shown")
    with progress:
        progress.start(3, 0)
        progress.advance(1)
        progress.fail({"task": "t", "stage": "answer", "error": "OSError", "reason": "full"}, 1)
    assert stream.getvalue().splitlines() == ["failed: t, answer: OSError: full"]


def test_a_program_may_listen_to_the_logger() -> None:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    LOG.addHandler(Ear())
    LOG.setLevel(logging.INFO)
    ConsoleProgress().note("importing")
    assert heard == ["importing"]


# --- doctor
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_doctor_refuses_what_an_attempt_refuses(attention: str) -> None:
    told = examine("tiny-llava", attn_implementation=attention)["model"]
    model = load("tiny-llava", attn_implementation=attention).model
    for name, answer in told["methods"].items():
        method = vtc.create(name)
        try:
            with vtc.compress(model, method, **({"retention": 1.0} if method.needs_budget else {})):
                refused = None
        except VTCError as error:
            refused = str(error)
        assert answer["refused"] == refused, name
        assert (answer["least"] is None) == (refused is not None)
    assert told["methods"]["fastv"]["least"] == (0.333 if attention == "sdpa" else None)


def test_the_doctor_names_what_is_not_supported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert app(args=["doctor", "--model", str(tmp_path), "--json"], standalone_mode=False) == 1
    told = json.loads(capsys.readouterr().out)
    assert "BertModel, which is not supported" in told["model"]["refused"]
    assert told["model"]["methods"] == {}
    assert told["versions"]["visual-token-compression"] == vtc.__version__
    assert told["extras"].keys() >= {"eval", "docs"}
    with pytest.raises(VTCError, match="no configuration can be read from 'no/such-model'"):
        app(args=["doctor", "--model", "no/such-model"], standalone_mode=False)
