"""`python tests/eval/speed.py` writes docs/results/sweep_speed.md: what a sweep costs, and the same cells one by one.

Wall time depends on what else a machine does, so that processor time stands beside it.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin

import vtc.eval.sweep
from vtc.app.pages import page
from vtc.eval import TASKS
from vtc.eval.spec import make_spec
from vtc.eval.store import Store
from vtc.eval.sweep import SweepResult, run_sweep

PAGE = Path(__file__).parents[2] / "docs" / "results" / "sweep_speed.md"
METHODS, RETENTIONS, BATCH = ("random", "vtc_cls", "hiprune"), (0.5, 0.25), 24
MORE = ("stride", "pool", "globalcom2", "todre")


@dataclass
class Clock:
    """Wall and processor seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def row(self, name: str) -> list[str]:
        """Of a table."""
        return [name, f"{self.wall:.1f}", f"{self.cpu:.1f}"]


@contextmanager
def timed(clock: Clock, who: int) -> Iterator[None]:
    """Add what the body takes, with the processor time of this process or of its children."""

    def used() -> float:
        usage = resource.getrusage(who)
        return usage.ru_utime + usage.ru_stime

    wall, cpu = time.perf_counter(), used()
    try:
        yield
    finally:
        clock.wall += time.perf_counter() - wall
        clock.cpu += used() - cpu


def commands(folder: Path, documents: int) -> tuple[list[str], list[list[str]]]:
    """The sweep, and one lmms-eval run for each of its cells."""
    python, limit = sys.executable, str(documents)
    sweep = [
        *(python, "-m", "vtc", "sweep", "--methods", ",".join(METHODS), "--limit", limit, "--out", str(folder / "s")),
        *("--retentions", ",".join(map(str, RETENTIONS)), "--batch-size", str(BATCH)),
    ]
    cells = ["pretrained=tiny-llava"]
    cells += [f"pretrained=tiny-llava,method={name},retention={share}" for name in METHODS for share in RETENTIONS]
    single = [python, "-m", "lmms_eval", "--model", "vtc", "--tasks", "tiny_image", "--include_path", str(TASKS)]
    single += ["--batch_size", str(BATCH), "--limit", limit, "--verbosity", "ERROR"]
    return sweep, [[*single, "--model_args", arguments] for arguments in cells]


def run(command: list[str], log: Path) -> Clock:
    """How long a command takes; it has to succeed."""
    clock = Clock()
    with log.open("w") as file, timed(clock, resource.RUSAGE_CHILDREN):
        status = subprocess.run(command, stdout=file, stderr=file, check=False).returncode
    if status:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return clock


def inside(folder: Path, **settings: Any) -> tuple[SweepResult, Clock, Clock, Clock]:
    """A sweep in this process: its result and the time of all of it, of answering, and of `model.generate`."""
    whole, answering, generating = Clock(), Clock(), Clock()
    run_items, generate = vtc.eval.sweep.run_items, GenerationMixin.generate

    def clocked(work: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
        def run(*given: Any, **more: Any) -> Any:
            with timed(clock, resource.RUSAGE_THREAD):
                return work(*given, **more)

        return run

    vtc.eval.sweep.run_items = clocked(run_items, answering)
    GenerationMixin.generate = clocked(generate, generating)
    try:
        with timed(whole, resource.RUSAGE_THREAD):
            result = run_sweep(make_spec({"out": folder, "batch_size": BATCH, "device": "cpu", **settings}))
    finally:
        vtc.eval.sweep.run_items, GenerationMixin.generate = run_items, generate
    return result, whole, answering, generating


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=96)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        swept, singles = commands(folder, given.documents)
        sweep = run(swept, folder / "log")
        single = Clock()
        for command in singles:
            clock = run(command, folder / "log")
            single = Clock(single.wall + clock.wall, single.cpu + clock.cpu)
        inside(folder / "warm", methods=["random"], retentions=[0.5], limit=BATCH)
        few = {"methods": METHODS, "retentions": RETENTIONS, "limit": given.documents}
        _, small, answering, generating = inside(folder / "few", **few)
        result, large, all_answering, all_generating = inside(folder / "many", **few | {"methods": METHODS + MORE})
        extra = len(Store(result.folder).cells()) - len(singles)
    fixed = [
        ((after - other) - (before - mine)) / extra
        for after, other, before, mine in (
            (large.wall, all_generating.wall, small.wall, generating.wall),
            (large.cpu, all_generating.cpu, small.cpu, generating.cpu),
        )
    ]
    outside = [
        [name, f"{1 - part.wall / of.wall:.1%}", f"{1 - part.cpu / of.cpu:.1%}"]
        for name, part, of in (
            (f"while answering {len(singles)} cells: share outside `model.generate`", generating, answering),
            (f"the same with {len(singles) + extra} cells", all_generating, all_answering),
        )
    ]
    rows = [
        sweep.row(f"`vtc sweep`, {len(singles)} cells"),
        single.row(f"`python -m lmms_eval --model vtc`, {len(singles)} times"),
        ["times faster", f"{single.wall / sweep.wall:.1f}", f"{single.cpu / sweep.cpu:.1f}"],
        ["fixed cost of one more cell (scoring, report, checks)", f"{fixed[0]:.2f}", f"{fixed[1]:.2f}"],
        *outside,
    ]
    words = (
        f"tiny-llava and {given.documents} questions of tiny_image in batches of {BATCH} on one CPU thread, a sweep of"
        f" {len(singles)} cells and the same cells by lmms-eval's own command line, one run each, start-up included."
        " Below, one process that has imported everything: what is added by one more cell besides `model.generate`, and"
        " the share of the answering loop (reading, preprocessing, attaching, storing) that is not `model.generate`."
    )
    table = (["what", "wall seconds", "processor seconds"], rows)
    packages = ("torch", "transformers", "lmms-eval")
    given.out.write_text(page("Speed of a sweep", "python tests/eval/speed.py", words, table, packages=packages))


if __name__ == "__main__":
    main()
