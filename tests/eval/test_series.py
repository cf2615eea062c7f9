"""Several sweeps in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vtc.errors import InputError, VTCError
from vtc.eval.series import make_series


def test_one_sweep_is_a_series_of_one() -> None:
    (spec,) = make_series({"limit": 3, "out": "here"})
    assert spec.limit == 3 and spec.folder == Path("here")


def test_each_has_what_the_file_says_and_its_own() -> None:
    first, second = make_series(
        {
            "methods": ["random"],
            "limit": 3,
            "sweeps": [{"model": "tiny-llava", "limit": 5}, {"model": "some/where/else", "tasks": "tiny_video"}],
        }
    )
    assert (first.model, first.limit, first.folder) == ("tiny-llava", 5, Path("results/tiny-llava"))
    assert (second.tasks, second.limit, second.folder) == (("tiny_video",), 3, Path("results/else"))
    assert first.methods == second.methods


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        ([], "sweeps is no list of settings"),
        ("tiny-llava", "sweeps is no list of settings"),
        ([{"model": "a"}, {"model": "b/a"}], "two sweeps are called 'a'"),
        ([{"model": "a"}, {"modell": "b"}], "my.yaml, sweep 2: unknown key 'modell'; did you mean 'model'"),
        ([{"retentions": [2]}], "my.yaml, sweep 1: retention 2 is outside"),
    ],
)
def test_what_cannot_be_meant_is_refused(sweeps: Any, words: str) -> None:
    with pytest.raises((InputError, VTCError), match=words):
        make_series({"sweeps": sweeps}, source="my.yaml")


@pytest.mark.slow
def test_the_command_runs_all_of_them(model_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    from vtc.cli import main

    settings = {
        "methods": ["stride", "random"],
        "retentions": [0.5],
        "tasks": ["blobs"],
        "include_path": [str(task_folder)],
        "device": "cpu",
        "out": str(tmp_path / "out"),
        "sweeps": [{"model": str(model_folder)}, {"name": "again", "model": str(model_folder), "seed": 1}],
    }
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(main.app, ["sweep", str(file), "--limit", "4", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [Path(each["folder"]).name for each in found["sweeps"]] == [model_folder.name, "again"]
    assert all((tmp_path / "out" / name / "report.html").is_file() for name in (model_folder.name, "again"))
    methods = {entry["method"]: entry for entry in found["retained"]}
    assert set(methods) == {"stride", "random"} and methods["stride"]["sweeps"] == 2
