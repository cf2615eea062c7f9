"""Every video benchmark from its rows and clips to its metrics, in one sweep of a small model with random weights."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from video_rows import MAKERS, MVBENCH, PLACES, write_clip, write_mvbench

from vtc.eval.spec import SweepSpec
from vtc.eval.suite import members
from vtc.eval.sweep import SweepResult, run_sweep

HERE = importlib.util.find_spec("decord") is not None
NAMES = [
    b.name for b in members("vtc_video") if b.name != "mvbench" and not b.not_run and (HERE or b.needs != "decord")
]
TASKS = [*NAMES, *(f"mvbench_{name}" for name in MVBENCH)]


@pytest.fixture(scope="module")
def small_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a model that takes videos."""
    from vtc.eval.tiny.export import export
    from vtc.eval.tiny.qwen import Qwen

    small = {"hidden": 64, "vision_layers": 2, "vision_inner": 96, "text_layers": 3, "text_inner": 96}
    family = Qwen(**small)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "qwen"
    export(family.build("sdpa"), folder, family.processor())
    return folder


@pytest.fixture(scope="module")
def data_map(tmp_path_factory: pytest.TempPathFactory, write_rows: Callable[..., dict[str, str]]) -> dict[str, Any]:
    """Rows and clips of all benchmarks."""
    folder = tmp_path_factory.mktemp("videos")
    mapping: dict[str, Any] = {name: {"data": file} for name, file in write_rows(MAKERS).items()}
    for name, place in PLACES.items():
        for number in range(2):
            write_clip(folder / name / place.format(number))
        mapping.setdefault(name, {})["media"] = str(folder / name)
    write_mvbench(folder / "mvbench", folder / "mvbench_clips")
    mapping["OpenGVLab/MVBench"] = {"data": str(folder / "mvbench"), "media": str(folder / "mvbench_clips")}
    return mapping


@pytest.fixture(scope="module")
def result(
    tmp_path_factory: pytest.TempPathFactory, judge: list[str], small_qwen: Path, data_map: dict[str, Any]
) -> SweepResult:
    """The sweep of the whole group."""
    spec = SweepSpec(
        model=str(small_qwen),
        methods=["vtc_cls"],
        retentions=[0.5],
        tasks=["mvbench", *NAMES],
        limit=2,
        video={"frames": 2},
        generation={"max_new_tokens": 4},
        data_map=data_map,
        out=tmp_path_factory.mktemp("sweep") / "out",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtc.eval.statistics.RESAMPLES", 50)
        patch.delenv("HF_HOME", raising=False)
        return run_sweep(spec)


def test_rows_are_made_for_every_benchmark_of_the_group() -> None:
    assert {b.name for b in members("vtc_video")} == {*MAKERS, "mvbench"}
    for benchmark in members("vtc_video"):
        if benchmark.name in MAKERS:
            assert set(benchmark.columns) <= set(next(MAKERS[benchmark.name]())), benchmark.name


@pytest.mark.parametrize("name", TASKS)
def test_a_benchmark_runs_from_clips_to_metrics(name: str, result: SweepResult) -> None:
    assert not result.failures
    metrics = result.results.metrics(name)
    assert metrics
    for metric in metrics:
        lines = result.results.select(name, metric)
        assert len(lines) == 2, "the untouched model and the method"
        assert all(math.isfinite(line["value"]) for line in lines)


def test_judges_score(result: SweepResult, judge: list[str]) -> None:
    for name, metric, value in (
        ("activitynetqa", "gpt_eval_score", 4.0),
        ("activitynetqa", "gpt_eval_accuracy", 100.0),
        ("videochatgpt_gen", "gpt_eval_score_context", 3.0),
        ("videochatgpt_consistency", "gpt_eval_score_consistency", 3.0),
        ("tempcompass_captioning", "avg_accuracy", 100.0),
    ):
        assert {line["value"] for line in result.results.select(name, metric)} == {value}, name
    assert {"gpt-4o-2024-11-20", "gpt-3.5-turbo-1106"} <= set(judge)


def test_nothing_is_left_of_the_redirections(result: SweepResult) -> None:
    import datasets.load
    import lmms_eval.api.task

    assert "HF_HOME" not in os.environ or "vtc-home" not in os.environ["HF_HOME"]
    for function in (datasets.load.load_dataset_builder, lmms_eval.api.task.snapshot_download):
        assert not function.__module__.startswith("vtc.")
    assert not type(os.environ).__getitem__.__module__.startswith("vtc.")
