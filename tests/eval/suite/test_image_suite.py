"""Every image benchmark from its rows to its metrics, in one sweep of the small embedded model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from image_rows import BESIDES, MAKERS

from vtc.eval.spec import SweepSpec
from vtc.eval.suite import members
from vtc.eval.sweep import SweepResult, run_sweep

NAMES = [benchmark.name for benchmark in members("vtc_image") if not benchmark.not_run]


@pytest.fixture(scope="module")
def result(
    tmp_path_factory: pytest.TempPathFactory, judge: list[str], write_rows: Callable[..., dict[str, str]]
) -> SweepResult:
    """The sweep of the whole group."""
    spec = SweepSpec(
        methods=["vtc_cls"],
        retentions=[0.25],
        tasks=["vtc_image"],
        limit=2,
        generation={"max_new_tokens": 4},
        data_map=write_rows({**MAKERS, **BESIDES}),
        out=tmp_path_factory.mktemp("sweep") / "out",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vtc.eval.statistics.RESAMPLES", 50)
        return run_sweep(spec)


def test_rows_are_made_for_every_benchmark_of_the_group() -> None:
    assert sorted(NAMES) == sorted(MAKERS)
    for benchmark in members("vtc_image"):
        first = next(MAKERS[benchmark.name]())
        assert set(benchmark.columns) <= set(first), benchmark.name


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_from_questions_to_metrics(name: str, result: SweepResult) -> None:
    assert not result.failures
    metrics = result.results.metrics(name)
    assert metrics
    for metric in metrics:
        lines = result.results.select(name, metric)
        assert len(lines) == 2, "the untouched model and the method"
        assert all(math.isfinite(line["value"]) for line in lines)


def test_the_judge_is_asked_where_rules_cannot_read_an_answer(result: SweepResult, judge: list[str]) -> None:
    assert set(judge) <= {"gpt-4o-2024-11-20"}


def test_what_scoring_writes_lies_in_the_folder_of_the_sweep(result: SweepResult) -> None:
    written = {path.parts[-2] for path in Path(result.folder, "submissions").rglob("*") if path.is_file()}
    assert {"textvqa_val", "mmbench_en_dev_static", "mmbench_cn_dev"} <= written
