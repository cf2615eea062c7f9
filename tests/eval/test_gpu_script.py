"""benchmarks/gpu.sh: every step with small shapes on the CPU, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vtc.eval.bench.arms import arms
from vtc.eval.bench.configs import SHAPES, config, family
from vtc.eval.bench.processors import processor
from vtc.method.budget import tokens_to_keep

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")
def test_every_step_runs_on_the_cpu(tmp_path: Path) -> None:
    done = run(str(tmp_path), "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in (tmp_path / "checks.txt").read_text() and "failed" not in done.stderr
    table = (tmp_path / "selections.md").read_text()
    assert table.startswith("# Selections on a device") and "| vtc_cls | 36 |" in table and "Failed" not in table
    assert "| llava-clip | random | - | - | - |" in (tmp_path / "waits.md").read_text()
    assert "untouched" in (tmp_path / "llava-1.5-7b" / "bench.csv").read_text()
    assert (tmp_path / "llava-1.5-7b" / "bench.html").exists()


def test_wrong_words_are_refused() -> None:
    for words in ((), ("--tiny",), ("out", "--fast")):
        done = run(*words)
        assert done.returncode == 2 and "bash benchmarks/gpu.sh OUT [--tiny]" in done.stderr


@pytest.fixture(scope="module")
def steps() -> Any:
    """The module of the steps, which lies outside the packages."""
    made = importlib.util.spec_from_file_location("gpu_steps", SCRIPT.with_suffix(".py"))
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("shape", "counts"),
    [("llava-1.5-7b", (192, 128, 64)), ("qwen2.5-vl-7b", (1496, 998)), ("qwen3-vl-4b", (1496, 998))],
)
def test_pictures_and_retentions_make_the_counts_that_are_promised(
    shape: str, counts: tuple[int, ...], steps: Any
) -> None:
    methods, retentions, load, _ = steps.RUNS[shape]
    assert len(arms(methods, retentions)) == 2 + 2 * len(retentions)
    sizes = SHAPES[shape]
    images = processor(family(sizes), sizes, config(sizes)).image_processor
    made = images(images=[Image.new("RGB", (load.width, load.height))], return_tensors="pt")
    tokens = 576 if "image_grid_thw" not in made else int(made["image_grid_thw"].prod()) // 4
    assert tokens == (576 if shape == "llava-1.5-7b" else 1995)
    assert tuple(tokens_to_keep(tokens, each) for each in retentions) == counts


def test_a_span_without_a_gpu_is_taken_by_the_clock(steps: Any) -> None:
    taken = steps.seconds(lambda: time.sleep(0.01), torch.device("cpu"), 3)
    assert 0.01 <= taken < 1 and steps.count(steps.waited(lambda: None, torch.device("cpu"))) == "-"
