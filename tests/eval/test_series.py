"""Several sweeps in one file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from vtc.errors import InputError, VTCError
from vtc.eval import series
from vtc.eval.comparisons import Retained, retained
from vtc.eval.results import read_results
from vtc.eval.series import make_series, overall, overall_table


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


def test_options_override_every_entry() -> None:
    """Of a video, those fields alone that they name."""
    settings = {
        "retentions": [0.5],
        "out": "there",
        "video": {"max_pixels": 9},
        "sweeps": [
            {"model": "tiny-llava", "limit": 5, "methods": ["random"]},
            {"name": "b", "tasks": ["tiny_video"], "keep": [9], "video": {"frames": 8, "sampling": "uniform"}},
        ],
    }
    options = {"limit": 2, "methods": ["stride"], "tasks": ["mine"], "retentions": ["0.25"], "video": {"frames": 4}}
    first, second = make_series(settings, {**options, "out": "here", "model": "tiny-qwen"})
    for spec in (first, second):
        assert (spec.model, spec.limit, spec.tasks, spec.retentions) == ("tiny-qwen", 2, ("mine",), (0.25,))
        assert [method.name for method in spec.methods] == ["stride"] and spec.video.frames == 4
    assert (first.video.max_pixels, second.video.sampling) == (9, "uniform")
    assert [spec.folder for spec in (first, second)] == [Path("here/tiny-qwen"), Path("here/b")]


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"sweeps": [{"limit": 5}]}, {"limit": 0}, "sweep, sweep 1: limit: .* 1, got 0"),
        ({"sweeps": [{"model": "a"}, {"model": "b"}]}, {"model": "c"}, "two sweeps are called 'c'; write a name: "),
        ({"video": 8}, {"video": {"frames": 2}}, "video: .* got 8"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make_series(settings, options)


def test_the_command_overrides_every_entry(command: Any, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump({"sweeps": [{"model": "tiny-llava", "limit": 3, "video": {"frames": 2}}]}))
    for option in (["--limit", "0"], ["--frames", "0"]):
        status, _, said = command("sweep", file, *option)
        assert status == 2 and "two.yaml, sweep 1: " in said, said


@pytest.mark.parametrize(
    ("sweeps", "words"),
    [
        ([], "sweeps is no list of settings"),
        ("tiny-llava", "sweeps is no list of settings"),
        ([{"model": "a"}, {"model": "b/a"}], "two sweeps are called 'a'"),
        ([{"model": "a"}, {"modell": "b"}], "my.yaml, sweep 2: unknown key 'modell'; did you mean 'model'"),
        ([{"model": "a", "out": "x"}], "my.yaml, sweep 1: out 'x' is that of one sweep of several"),
        ([{"retentions": [2]}], "my.yaml, sweep 1: retention=2.0 is outside"),
    ],
)
def test_what_cannot_be_meant_is_refused(sweeps: Any, words: str) -> None:
    with pytest.raises((InputError, VTCError), match=words):
        make_series({"sweeps": sweeps}, source="my.yaml")


def test_the_mean_is_over_all_tasks_of_all_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    one = [line("random", 0.5, {"a": 90.0, "b": 80.0}), line("atp(weights=x)", 0.5, {"a": 100.0, "b": 100.0})]
    two = [
        line("random", 0.5, {"c": 40.0}),
        line("random", 0.25, {"c": 10.0}),
        line("atp(weights=y)", 0.5, {"c": 97.0}),
    ]
    monkeypatch.setattr(series, "retained", lambda results, seeds: results.lines)
    several: Any = [SimpleNamespace(run={"tasks": {}}, lines=lines) for lines in (one, two)]
    found = overall(several)
    assert [(each.method, each.retention, each.percent, each.sweeps, each.tasks) for each in found] == [
        ("atp", 0.5, 99.0, 2, 3), ("random", 0.5, 70.0, 2, 3),
    ]  # fmt: skip
    console = Console(width=80, file=(shown := io.StringIO()))
    console.print(overall_table(found))
    assert [word for word in shown.getvalue().split() if word in ("atp", "99.0", "random", "70.0")] == [
        "atp", "99.0", "random", "70.0",
    ]  # fmt: skip


def test_the_interval_is_over_the_questions_of_all_sweeps(tmp_path: Path, write_store: Any) -> None:
    """Two models on the same questions are less certain than on other ones, and no less certain than one of them."""
    rng = np.random.default_rng(0)
    hits = [(rng.random(200) < share).astype(float).tolist() for share in (0.9, 0.6)]
    clusters = [n // 2 for n in range(200)]

    def found(*sweeps: tuple[str, str]) -> Any:
        several = []
        for number, (task, fingerprint) in enumerate(sweeps):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}-{number}"
            given = {"clusters": {task: clusters}, "fingerprint": fingerprint}
            several.append(read_results(write_store(folder, [("none", 1.0), ("a", 0.5)], {task: hits}, **given)))
        (entry,) = overall(several)
        return entry, retained(several[0])[0]

    alone, line = found(("t", "f"))
    assert (alone.percent, alone.low, alone.high) == (line.percent, line.low, line.high)
    assert alone.low < alone.percent < alone.high
    same, _ = found(("t", "f"), ("t", "f"))
    assert (same.low, same.high) == pytest.approx((alone.low, alone.high))
    for others in ((("t", "f"), ("u", "f")), (("t", "f"), ("t", "g"))):
        apart, _ = found(*others)
        assert apart.high - apart.low == pytest.approx((same.high - same.low) / 2**0.5, rel=0.1)
    console = Console(width=80, file=(shown := io.StringIO()))
    console.print(overall_table([same]))
    assert f"{same.low:.1f} to {same.high:.1f}" in shown.getvalue()


def line(method: str, retention: float, tasks: dict[str, float]) -> Retained:
    return Retained(retention, method, fmean(tasks.values()), None, None, None, tasks)


@pytest.mark.slow
def test_the_command_runs_all_of_them(tmp_path: Path) -> None:
    from vtc.cli.main import app

    settings = {
        "methods": ["stride", "pool"],
        "retentions": [0.5],
        "device": "cpu",
        "out": str(tmp_path / "out"),
        "sweeps": [{"model": "tiny-llava"}, {"name": "words", "tasks": ["tiny_image_words"]}],
    }
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(settings))
    result = CliRunner().invoke(app, ["sweep", str(file), "--limit", "6", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [Path(each["out"]).name for each in found["sweeps"]] == ["tiny-llava", "words"]
    assert all((tmp_path / "out" / name / "report.html").is_file() for name in ("tiny-llava", "words"))
    methods = {entry["method"]: entry for entry in found["retained"]}
    assert set(methods) == {"stride", "pool"}
    assert (methods["stride"]["sweeps"], methods["stride"]["tasks"]) == (2, 2)
    shown = CliRunner().invoke(app, ["sweep", str(file), "--limit", "6"])
    assert "over all sweeps" in shown.stdout and "0 answers in" in shown.stdout
