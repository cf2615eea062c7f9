"""The commands as a shell sees them: what is on stdout, what on stderr, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vtc.cli

WriteTask = Callable[..., Path]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A function that runs `vtc` in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtc", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            vtc.cli.main()
        captured = capfd.readouterr()
        code: Any = end.value.code
        return code or 0, captured.out, captured.err

    return run


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def arguments(model_folder: Path, task_folder: Path, tmp_path: Path) -> list[object]:
    """Of a sweep that takes a second."""
    return [
        "sweep", "--model", model_folder, "--methods", "random, stride", "--retentions", "0.1", "--tasks", "blobs",
        "--include-path", task_folder, "--limit", "4", "--out", tmp_path / "out",
    ]  # fmt: skip


def test_json_is_alone_on_stdout(command: Command, arguments: list[object], tmp_path: Path) -> None:
    code, out, err = command(*arguments, "--json")
    summary = json.loads(out)
    assert code == 0
    assert (summary["out"], summary["answered"], summary["failures"]) == (str(tmp_path / "out"), 12, [])
    assert {(m["method"], m["metric"]) for m in summary["metrics"]} >= {("none", "accuracy"), ("stride", "place")}
    assert "loading" in err

    code, out, _ = command("report", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["metrics"] == summary["metrics"]


def test_the_table_is_on_stdout(command: Command, arguments: list[object], tmp_path: Path) -> None:
    code, out, _ = command(*arguments)
    assert code == 0
    assert "blobs: accuracy (%), 4 questions" in out and "untouched" in out
    assert str(tmp_path / "out" / "report.html") in out.replace("\n", "")


def test_a_file_is_overridden_by_options(command: Command, arguments: list[object], tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("methods: [{name: random, seed: 4}]\nlimit: 2\nretentions: [0.3]\n")
    settings = [a for a in arguments if a not in ("sweep", "--methods", "random, stride", "--retentions", "0.1")]
    code, out, _ = command("sweep", file, *settings, "--json")
    assert code == 0
    assert {(m["method"], m["seed"], m["retention"]) for m in json.loads(out)["metrics"]} == {
        ("none", 0, 1.0),
        ("random(seed=4)", 4, 0.3),
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["sweep", "--methods", "vtc-cls"], "did you mean 'vtc_cls'"),
        (["sweep", "--retentions", "0.5,2"], "retention 2 is outside (0, 1]"),
        (["sweep", "--retentions", "half"], "retentions.0: input should be a valid number"),
        (["sweep", "--tasks", ","], "tasks is empty"),
        (["sweep", "nope.yaml"], "no sweep file 'nope.yaml'"),
        (["report", "nowhere"], "'nowhere' holds no sweep"),
        (["tasks", "--include-path", "nowhere"], "include path 'nowhere' is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*given)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1] and err.splitlines()[-1].startswith("vtc: error: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_cell_is_status_one(
    command: Command, arguments: list[object], tmp_path: Path, write_task: WriteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = write_task(tmp_path / "tasks", "judged", process="broken")
    changed = [{"blobs": "judged"}.get(str(a), a) for a in arguments]
    code, out, err = command(*changed, "--include-path", folder, "--json")
    assert code == 1
    assert {f["reason"] for f in json.loads(out)["failures"]} == {"no judge"}
    assert "failed: judged, score: RuntimeError: no judge" in err
    code, out, _ = command(*changed, "--include-path", folder)
    assert code == 1 and "incomplete: judged, random at 0.1: 4 of 4 answers; score: RuntimeError: no judge" in out


def test_tasks_are_listed(command: Command, task_folder: Path) -> None:
    code, out, _ = command("tasks", "--json", "--include-path", task_folder)
    assert code == 0 and {"blobs", "tiny_image"} <= {entry["name"] for entry in json.loads(out)}
    code, out, _ = command("tasks")
    assert code == 0 and any(line.startswith("tiny_image ") for line in out.splitlines())


@pytest.mark.slow
def test_lmms_evals_own_tasks_are_listed_where_asked(command: Command) -> None:
    code, out, _ = command("tasks", "--all", "--json")
    names = {entry["name"] for entry in json.loads(out)}
    assert code == 0 and {"pope", "mme", "textvqa_val", "tiny_image"} <= names
    assert len(names) > 1000


def test_the_commands_import_nothing_heavy() -> None:
    heavy = ("lmms_eval", "datasets", "matplotlib", "scipy", "pydantic", "rich.progress")
    imports = "import sys, vtc.eval, vtc.eval.cli, vtc.eval.lmms_plugin"
    code = f"{imports}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
