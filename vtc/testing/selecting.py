"""`python -m vtc.testing.selecting` times every method's selection as a whole against its released forms.

The three run interleaved in one process on the same views. What counts is the processor time of the one thread, so that
other work on the machine shows less.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from vtc.app.pages import page
from vtc.testing.released import SHAPES, WIDE, Scene, SelectionCase, fresh
from vtc.testing.released.cases import selection_cases

BATCH, ROUNDS, ENOUGH = 8, 50, 2.0
"""Items; rounds per case and size, and the seconds after which no further round begins."""


def arms(case: SelectionCase, scene: Scene) -> list[Callable[[], Any]]:
    """Ours, the plain batched form, the loop over images."""
    return [lambda: scene.method.select(fresh(scene.view)), lambda: case.batched(scene), lambda: case.loop(scene)]


@torch.no_grad()
def measure(case: SelectionCase, tokens: int) -> list[float]:
    """Median milliseconds of the three arms."""
    scene = case.scene(SHAPES[tokens], BATCH)
    times: list[list[float]] = [[], [], []]
    begun = time.perf_counter()
    for _ in range(ROUNDS + 1):
        for arm, taken in zip(arms(case, scene), times, strict=True):
            start = time.thread_time()
            arm()
            taken.append(1000 * (time.thread_time() - start))
        if time.perf_counter() - begun > ENOUGH:
            break
    return [statistics.median(taken[1:] or taken) for taken in times]  # the first round warms up


def report(rows: Iterable[Sequence[str]]) -> str:
    """The document around the rows."""
    rows = list(rows)
    about = f"""CPU, one thread, its processor time, batch {BATCH}, medians of up to {ROUNDS} interleaved rounds; other
    work ran on the machine meanwhile. Rows are {WIDE} numbers wide where a method compares tokens. "batched" is the
    released algorithm in plain batched torch for items of one shape, without masks, ties or a record of what merged;
    "loop" treats image after image. Above 1, ours is faster."""
    head = "selection", "tokens", "kept", "ms", "batched ms", "loop ms", "batched / ours", "loop / ours"
    ratios = [[float(row[column]) for row in rows] for column in (6, 7)] if rows else [[1.0], [1.0]]
    medians = [statistics.median(column) for column in ratios]
    last = f"""Median over the rows: {medians[0]:.2f} of the batched form, {medians[1]:.2f} of the loop. What ranks
    recorded numbers takes milliseconds at most in every form; ours pays there for items of several sizes and for ties
    that do not depend on the batch."""
    gpu = """On a GPU the greedy walks run as a Triton kernel: docs/results/h200/selections.md."""
    title, command = "Selections against their released forms", "python -m vtc.testing.selecting"
    return page(title, command, about, (head, rows), " ".join(last.split()), gpu, packages=("torch",))


def main() -> None:
    """Print the document; each line of its table goes to stderr as soon as it is measured."""
    torch.set_num_threads(1)
    rows = []
    for name, case in selection_cases().items():
        for tokens in SHAPES:
            if not case.fits(SHAPES[tokens]):
                continue
            ours, batched, loop = measure(case, tokens)
            kept = case.scene(SHAPES[tokens], 1).keep
            cells = [f"{each:.2f}" for each in (ours, batched, loop, batched / ours, loop / ours)]
            rows.append([name, str(tokens), str(kept), *cells])
            print(*rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(report(rows))


if __name__ == "__main__":
    main()
