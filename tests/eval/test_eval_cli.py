"""The commands as a shell sees them: what is on stdout, what on stderr, and the exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vtc
import vtc.cli.main
from vtc.errors import VTCError
from vtc.eval.spec import make_spec
from vtc.eval.sweep import run_sweep
from vtc.method.registry import METHODS

WriteTask = Callable[..., Path]


@dataclass(frozen=True)
class Unregistered(vtc.ScoringCompressor):
    """Known to nobody but its object."""

    name: ClassVar[str] = "unregistered"

    def score(self, view: vtc.StageView) -> Any:
        return view.tokens.norm(dim=-1)


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

    code, out, _ = command("report", tmp_path / "out", "--rescore", "--json")
    assert code == 0 and (json.loads(out)["metrics"], json.loads(out)["outdated"]) == (summary["metrics"], [])
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 6  # three cells, scored twice


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
        (["sweep", "--retentions", "0.5,2"], "retention=2.0 is outside (0, 1]"),
        (["sweep", "--retentions", "half"], "retentions.0: input should be a valid number"),
        (["sweep", "--tasks", ","], "tasks is empty"),
        (["sweep", "nope.yaml"], "no sweep file 'nope.yaml'"),
        (["report", "nowhere"], "'nowhere' holds no sweep"),
        (["report", "nowhere", "--rescore"], "'nowhere' holds no sweep"),
        (["report", "nowhere", "--include-path", "."], "add --rescore"),
        (["tasks", "--include-path", "nowhere"], "include path 'nowhere' is not a folder"),
        (["sweep", "--out", ""], "the output path is empty"),
        (["sweep", "--out", "x" * 300], "a name of 300 bytes"),
        (["sweep", "--model", ""], "model is empty"),
        (["sweep", "x" * 300], "is too long for a file"),
        (["report", "x" * 300], "File name too long"),
        (["train", "--method", "atp", "--out", ""], "the output path is empty"),
        (["calibrate", "--retention", "0.5", "--out", " "], "the output path is empty"),
        (["tiny", "train", "--out", ""], "the output path is empty"),
        (["tiny", "questions", "--out", ""], "the output path is empty"),
        (["sweep", "--methods", "hiprune+aim(merge=false)"], "take a retention each"),
        (["sweep", "--methods", "atp(weights=none.safetensors)"], "none.safetensors"),
        (["sweep", "--plugin", "no_such_module"], "plugin 'no_such_module' cannot be imported"),
        (["methods", "--plugin", "none.py"], "plugin 'none.py' is no file"),
        (["train", "--method", "atp", "--out", "run", "--plugin", "json"], "plugin 'json' registers no method"),
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


def test_options_repeat_and_take_commas(command: Command, arguments: list[object]) -> None:
    more = ["--methods", "pool,random@0.2", "--methods", "stride+mustdrop(merge=off,filter=off,layers=[0],depth=null)"]
    code, out, _ = command(*arguments, *more, "--retentions", "0.3", "--tasks", "blobs", "--json")
    assert code == 0
    assert {(m["method"], m["retention"]) for m in json.loads(out)["metrics"]} == {
        ("none", 1.0),
        *((m, r) for m in ("random", "stride", "pool") for r in (0.1, 0.3)),
        ("random", 0.2),
        *(("stride+mustdrop(merge=off, filter=off, layers=(0,), depth=None)", r) for r in (0.1, 0.3)),
    }


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
import vtc

@vtc.register
@dataclass(frozen=True)
class Own(vtc.ScoringCompressor):
    'Keep the first tokens, [bold]all[/bold] of one kind.'

    rule: str = "a"
    name: ClassVar[str] = "own_first"

    def score(self, view):
        return -view.crop.float()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    yield file
    METHODS.unregister("own_first")


def test_a_method_of_ones_own(
    command: Command, arguments: list[object], tmp_path: Path, plugin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    odd = tmp_path / "out [bold]"
    methods = "own_first(rule='[red]'),own_first"
    code, out, err = command(*arguments, "--plugin", plugin, "--methods", methods, "--out", odd)
    assert code == 0 and f"plugin {plugin}: own_first" in err
    assert "own_first(rule=[red])" in out
    assert str(odd / "report.html") in out
    code, out, _ = command("methods", "--plugin", plugin, "--json")
    assert code == 0 and "own_first" in {entry["name"] for entry in json.loads(out)}
    code, out, _ = command("methods", "--plugin", plugin)
    assert code == 0 and "[bold]all[/bold]" in out
    code, out, _ = command("methods", "--plugin", plugin, "--long")
    assert code == 0 and "Keep the first tokens, [bold]all[/bold]" in out


def test_an_object_and_a_combination_from_python(model_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": str(model_folder), "tasks": ["blobs"], "include_path": [task_folder], "limit": 2,
        "retentions": [0.25], "out": tmp_path / "out",
    }  # fmt: skip
    with pytest.raises(VTCError, match="both act at 0"):
        run_sweep(make_spec({**settings, "methods": ["random@0.5+stride@0.5"]}))
    pair = "random@0.5+mustdrop(merge=off,layers=[0],depth=null)@0.7"
    spec = make_spec({**settings, "methods": [Unregistered(), pair]})
    result = run_sweep(spec)
    assert (result.failures, result.answered) == ([], 6)
    kept = {line["method"]: line["visual_tokens_kept"] for line in result.results.select("blobs", "accuracy")}
    assert kept["unregistered"] == 36 and 36 < kept[spec.methods[1].label] < 72
    assert run_sweep(spec).answered == 0  # taken up again, by the same keys


def test_a_retention_out_of_reach_is_left_out_before_the_first_answer(
    command: Command, arguments: list[object]
) -> None:
    text = "mustdrop(merge=off,layers=[0],depth=null)"
    code, out, err = command(*arguments, "--methods", text, "--retentions", "0.6", "--json")
    assert code == 0 and "left out: retention=0.1 cannot be met by 'mustdrop' here: 1 of 2 LLM layers" in err
    assert {m["retention"] for m in json.loads(out)["metrics"] if m["method"].startswith("mustdrop")} == {0.6}


@pytest.mark.slow
def test_lmms_evals_own_tasks_are_listed_where_asked(command: Command) -> None:
    code, out, _ = command("tasks", "--all", "--json")
    names = {entry["name"] for entry in json.loads(out)}
    assert code == 0 and {"pope", "mme", "textvqa_val", "tiny_image"} <= names
    assert len(names) > 1000


def test_the_commands_import_nothing_heavy() -> None:
    heavy = ("lmms_eval", "datasets", "matplotlib", "scipy", "pydantic", "rich.progress")
    imports = "import sys, vtc.eval, vtc.cli.sweep, vtc.eval.lmms_plugin"
    code = f"{imports}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
