"""`python -m vtc.testing.timing` times every function of `vtc.ops` against its plain reference.

Both run interleaved in one process on the same large arguments; medians. A reference is written as the equations are,
with loops over items and tokens, so the ratio says what batching is worth on one CPU thread, not how good the code is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

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


def main() -> None:
    """Print a Markdown table."""
    torch.set_num_threads(1)
    print("# Functions of vtc.ops against their plain references\n")
    print(
        f"Made by `python -m vtc.testing.timing`: CPU, one thread, medians of up to {ROUNDS} interleaved rounds on the"
    )
    print("large arguments of `vtc.testing.plain`; a dash where a function only moves data and has no reference.")
    print(f"torch {torch.__version__.split('+')[0]}.\n")
    print("| function | ms | plain ms | plain / function |")
    print("|---|---|---|---|")
    for name, case in op_cases().items():
        ours, plain = measure(case)
        rest = "- | -" if plain is None else f"{plain:.1f} | {plain / ours:.1f}"
        print(f"| {name} | {ours:.2f} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
