"""A bench of a model with random weights, measured once for all tests that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vtc.eval.bench.run import bench
from vtc.eval.bench.spec import BenchSpec, Load


@pytest.fixture(scope="session")
def small(model_folder: Path) -> BenchSpec:
    """Little to measure of everything: two batch sizes, two loads, all kinds of arms."""
    methods = ("random", "fastv(layer=1)@0.9", "downsample", "fastv(layer=1)@0.1")
    return BenchSpec(
        str(model_folder), methods, (0.25,), (1, 2), new_tokens=3, repeats=2, warmup=0, load=Load(1, 168, 168),
        loads=(Load(1, 168, 168), Load(2, 168, 168)), device="cpu", prompt="what is shown ?",
    )  # fmt: skip


@pytest.fixture(scope="session")
def measured(small: BenchSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The record of that, and its folder."""
    folder = tmp_path_factory.mktemp("bench") / "one"
    return bench(small, folder), folder
