"""Results in trackers: curves over the kept tokens, through accelerate's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking as trackers

from vtc.errors import InputError
from vtc.eval.spec import make_spec
from vtc.eval.sweep import run_sweep
from vtc.eval.tracking import check_trackers, curves


class Recorder(trackers.GeneralTracker):
    """Keeps what it is told."""

    name = "recorder"
    requires_logging_directory = True
    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.logging_dir = run_name, logging_dir
        self.told: list[Any] = []
        Recorder.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


def settings(model_folder: Path, task_folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model_folder), "methods": ["stride"], "retentions": [0.5, 0.25], "tasks": ["blobs"],
        "include_path": [str(task_folder)], "device": "cpu", "limit": 2, "out": str(out), **more,
    }  # fmt: skip


def test_metrics_are_curves_over_the_kept_tokens(
    model_folder: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr("vtc.eval.sweep.check_trackers", lambda names: None)
    spec = make_spec(settings(model_folder, task_folder, tmp_path / "out", trackers=["recorder"]))
    result = run_sweep(spec)
    (made,) = Recorder.made
    assert (made.run_name, made.logging_dir) == ("out", str(tmp_path / "out" / "tracking"))
    assert made.told[0] == "start" and made.told[-1] == "finish"
    assert made.told[1:-1] == curves(result.results)
    assert [step for step, _ in made.told[1:-1]] == [36, 72, 144]
    (untouched,) = [line for line in result.results.select("blobs", "accuracy") if line["method"] == "none"]
    assert made.told[-2][1]["blobs/accuracy/none"] == untouched["value"]
    assert made.settings["seed"] == 0 and made.settings["retentions"] == "[0.5, 0.25]"


def test_trackers_are_checked_before_a_sweep(model_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        run_sweep(make_spec(settings(model_folder, task_folder, tmp_path / "out", trackers="tensorbord")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="pip install clearml"):
        check_trackers(["clearml"])
    check_trackers([])


def test_a_tracker_that_fails_loses_no_result(
    model_folder: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Recorder):
        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            raise OSError("no server")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "broken", Broken)
    monkeypatch.setattr("vtc.eval.sweep.check_trackers", lambda names: None)
    with pytest.raises(InputError, match=r"tracker 'broken' failed \(no server\); the results lie in"):
        run_sweep(make_spec(settings(model_folder, task_folder, tmp_path / "out", trackers=["broken"])))
    assert (tmp_path / "out" / "report.html").is_file()
