"""`python -m vtc.testing.timing` times every function of `vtc.ops` against its plain reference.

Both run interleaved in one process on the same large arguments; medians. A reference is written as the equations are,
with loops over items and tokens, so the ratio says what batching is worth on one CPU thread, not how good the code is.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from vtc.app.pages import page
from vtc.testing.plain import OpCase, op_cases

ROUNDS, ENOUGH = 5, 6.0
"""Rounds per function, and the seconds after which no further round begins."""


@torch.no_grad()
def measure(case: OpCase) -> tuple[float, float | None]:
    """Median milliseconds of the function and of its reference (None where there is none) on the large arguments."""
    given = case.make("large")
    arms: list[Callable[..., Any]] = [case.op, *([case.plain] if case.plain else [])]
    times: list[list[float]] = [[] for _ in arms]
    case.op(**given)
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for arm, taken in zip(arms, times, strict=True):
            start = time.perf_counter()
            arm(**given)
            taken.append(1000 * (time.perf_counter() - start))
        if time.perf_counter() - begun > ENOUGH:
            break
    medians = [statistics.median(taken) for taken in times]
    return medians[0], medians[1] if case.plain else None


def report(rows: Iterable[Sequence[str]]) -> str:
    """The document around the rows."""
    about = f"""CPU, one thread, medians of up to {ROUNDS} interleaved rounds on the large arguments of
    `vtc.testing.plain`; a dash where a function only moves data and has no reference."""
    head = "function", "ms", "plain ms", "plain / function"
    title = "Functions of vtc.ops against their plain references"
    return page(title, "python -m vtc.testing.timing", about, (head, rows), packages=("torch",))


def main() -> None:
    """Print the document; each line of its table goes to stderr as soon as it is measured."""
    torch.set_num_threads(1)
    rows = []
    for name, case in op_cases().items():
        ours, plain = measure(case)
        rest = ["-", "-"] if plain is None else [f"{plain:.1f}", f"{plain / ours:.1f}"]
        rows.append([name, f"{ours:.2f}", *rest])
        print(*rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(report(rows))


if __name__ == "__main__":
    main()
