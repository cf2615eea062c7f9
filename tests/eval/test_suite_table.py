"""The table of benchmarks agrees with lmms-eval's own files, and is shown."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from vtc.cli.main import app
from vtc.errors import UnknownName
from vtc.eval.suite import BENCHMARKS, GROUPS, RUN, STAND_IN, Benchmark, expand, members


class _Loader(yaml.SafeLoader):
    """Reads task files without running their code."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: node.value)


@functools.cache
def files() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Tasks and groups in the folders that the names in the table begin with: file and settings, templates included."""
    package = importlib.util.find_spec("lmms_eval")
    assert package is not None and package.origin is not None
    folders = [path for path in (Path(package.origin).parent / "tasks").iterdir() if path.is_dir()]
    near = [path for path in folders if any(benchmark.name.startswith(path.name) for benchmark in BENCHMARKS)]
    found = {}
    for path in (file for folder in near for file in [*folder.glob("*.yaml"), *folder.glob("val/*.yaml")]):
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if "include" in settings:
            settings = yaml.load((path.parent / settings["include"]).read_text(encoding="utf-8"), _Loader) | settings
        task = settings["task"]
        found[task if isinstance(task, str) else settings["group"]] = path, settings
    return found


def reads(code: str, column: str) -> bool:
    """Whether code names a column, itself or with a number."""
    stem = column.rstrip("0123456789")
    return bool(re.search(rf"""["']({re.escape(column)}|{re.escape(stem)}\{{i\}})["']""", code))


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_a_line_says_what_lmms_evals_files_say(benchmark: Benchmark) -> None:
    path, settings = files()[benchmark.name]
    if isinstance(settings["task"], list):
        path, settings = files()[settings["task"][0]]
        settings = {**settings, "dataset_name": None}
    configuration = settings.get("dataset_name")
    assert benchmark.data == settings["dataset_path"] + (f":{configuration}" if configuration else "")
    folder = (settings.get("dataset_kwargs") or {}).get("cache_dir", "")
    assert bool(folder) == bool(benchmark.media) and f"{benchmark.media}/".startswith(folder)
    code = "".join(file.read_text(encoding="utf-8") for file in path.parent.glob("*.py"))
    for part in benchmark.also.split(":"):
        assert part in code
    if benchmark.judge:
        assert benchmark.judge in code
    if benchmark.needs:
        assert f"from {benchmark.needs} import" in code
    targets = settings.get("doc_to_target")
    assert [column for column in benchmark.columns if not reads(code, column) and column != targets] == []


def test_groups_become_their_tasks_and_other_names_stay() -> None:
    assert [name for name, _ in expand(["vtc_video"])] == [benchmark.name for benchmark in members("vtc_video")]
    assert expand(["pope", "vtc_image"])[:2] == [("pope", "pope"), ("mme", "vtc_image")]
    assert {benchmark.group for benchmark in BENCHMARKS} == set(GROUPS)
    assert {benchmark.status for benchmark in BENCHMARKS} == {RUN, STAND_IN}


def test_the_command_shows_what_one_needs(tmp_path: Path) -> None:
    def shown(*arguments: str) -> str:
        found = CliRunner().invoke(app, ["tasks", *arguments])
        assert found.exit_code == 0, found.output
        return found.stdout

    assert "--limit must be even" in shown("mme") and "lmms-lab-encoder/MME" in shown("mme")
    video = shown("videomme", "gqa")
    assert "$HF_HOME/videomme/data" in video and "videoID, question" in video and "GQA:testdev_balanced_images" in video
    assert [entry["name"] for entry in json.loads(shown("vtc_image", "--json"))] == [
        b.name for b in members("vtc_image")
    ]
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\ndataset_kwargs: {data_files: my.jsonl}\n")
    mine = shown("mine", "--include-path", str(tmp_path))
    assert "my.jsonl" in mine and str(tmp_path / "mine.yaml") in mine


def test_a_task_that_there_is_not_is_refused() -> None:
    found = CliRunner().invoke(app, ["tasks", "tiny_imagee"])
    assert isinstance(found.exception, UnknownName) and "did you mean 'tiny_image'" in str(found.exception).replace(
        '"', "'"
    )


def test_the_command_shows_them() -> None:
    shown = CliRunner().invoke(app, ["tasks"])
    assert shown.exit_code == 0
    start = shown.stdout.index("vtc_image")
    assert max(map(len, shown.stdout[start:].splitlines())) <= 100
    line = next(line for line in shown.stdout.splitlines() if line.startswith("mmbench_cn_dev "))
    assert line.split()[1:3] == ["4329", "gpt-4o-2024-11-20*"]
    listed = {entry["name"]: entry for entry in json.loads(CliRunner().invoke(app, ["tasks", "--json"]).stdout)}
    assert set(GROUPS) <= set(listed)
    assert listed["videomme"]["media"] == "videomme/data" and listed["videomme"]["modality"] == "video"
    assert listed["gqa"]["also"] == "lmms-lab-encoder/GQA:testdev_balanced_images"
