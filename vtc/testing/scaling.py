"""`python -m vtc.testing.scaling` measures how time and memory of every method's selection grow with the tokens.

One item of one raster, so that methods which work inside crops or frames meet all tokens at once: the hard case. Memory
is what the torch profiler sees allocated during the call, the view that goes in not counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vtc.app.pages import page, wrapped
from vtc.method.base import EncoderStage, StageView
from vtc.testing.released import SelectionCase, fresh
from vtc.testing.released.cases import selection_cases
from vtc.testing.views import raster

SIDES = 32, 55, 100, 173, 316
"""Rasters of about 1k, 3k, 10k, 30k and 100k tokens."""
WIDTH, SHARE, STEPS, ITERATIONS = 64, 0.1, 64, 10
"""Numbers in a row; share of the tokens that stays; tokens that one-by-one methods keep; rounds of k-means."""
ROUNDS, ENOUGH = 5, 1.0
"""Rounds, and the seconds from which on a size is measured once."""
LIMIT = 2 * 2**30


def seen(case: SelectionCase, side: int) -> tuple[Any, StageView]:
    """The method of a case, and its view of one raster of side x side random tokens."""
    options, keep = dict(case.options), None
    if "retain" in options:
        options["retain"] = side * side // 2
    if "iterations" in options:
        options["iterations"] = ITERATIONS
    if case.steps == "kept":
        keep = STEPS
    share = SHARE if case.share == SelectionCase.share else case.share  # the others act behind layers that see all
    case = dataclasses.replace(case, options=options, share=share)
    return case.seen(raster(side, side), 1, keep=keep, width=WIDTH)


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that `call` holds at once of what it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@torch.no_grad()
def measure(case: SelectionCase, sides: Sequence[int] = SIDES) -> list[tuple[int, float, int]]:
    """Tokens, median milliseconds and peak bytes for every size; the sizes take turns."""
    arms = [seen(case, side) for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    peaks: list[int] = []
    for number in range(ROUNDS + 1):
        for (method, view), taken in zip(arms, times, strict=True):
            if number and taken[0] > 1000 * ENOUGH:
                continue
            view = fresh(view)
            start = time.thread_time()
            if number:
                method.select(view)
            else:  # warms up
                peaks.append(peak(functools.partial(method.select, view)))
            taken.append(1000 * (time.thread_time() - start))
    medians = [statistics.median(taken[1:] or taken) for taken in times]
    return [(side * side, *each) for side, each in zip(sides, zip(medians, peaks, strict=True), strict=True)]


def row(name: str, found: Sequence[tuple[int, float, int]]) -> list[str]:
    """A line of the table."""
    (before, short, _), (last, long, most) = found[-2:]
    slope = math.log(long / short) / math.log(last / before)
    cells = [f"{ms:.2f}" for _, ms, _ in found]
    return [name, *cells, f"{slope:.2f}", f"{most / 2**20:.0f}", "yes" if most < LIMIT else "NO"]


def report(rows: Iterable[Sequence[str]]) -> str:
    """The document around the rows."""
    about = f"""CPU, one thread, its processor time, one item of one raster, rows {WIDTH} numbers wide, {SHARE:.0%} of
    the tokens kept, where a method prunes between layers a share that its budget allows. Methods that choose token
    after token keep {STEPS} at every size, and so do those that cluster, with {ITERATIONS} rounds of k-means, so that
    what grows is N alone. Medians of {ROUNDS} rounds in which the sizes take turns; a size that takes more than
    {ENOUGH:.0f} s was measured once, together with its memory. The slope is that of log time over log N between the
    last two sizes: 1 is linear, 2 quadratic, less than 1 is dominated by what every call costs. Memory is the most that
    the call of the largest size held at once of what it allocated, as the torch profiler counts; the limit is
    {LIMIT // 2**30} GiB. Methods that compare frames are left out,
    one raster is one frame, and so are those inside the encoder, which sees a crop at a time."""
    head = "selection", *(f"{side * side} tokens, ms" for side in SIDES), "slope", "peak MiB", "under the limit"
    quadratic = """No selection holds N x N numbers once N is large. Those that compare a share of the tokens with all
    others (merging, the contextual tokens of visionzip, the most isolated token that divprune begins with) stream the
    comparison and take quadratic time. The readings of attention layers are not part of a selection; `vtc cost` counts
    them."""
    title, command = "Time and memory of a selection as tokens grow", "python -m vtc.testing.scaling"
    return page(title, command, about, (head, rows), wrapped(quadratic), packages=("torch",))


def main() -> None:
    """Print the document; each line of its table goes to stderr as soon as it is measured."""
    torch.set_num_threads(1)
    rows = []
    for name, case in selection_cases().items():
        if case.video or isinstance(case.stage, EncoderStage):
            continue
        rows.append(row(name, measure(case)))
        print(*rows[-1], file=sys.stderr, flush=True)
    sys.stdout.write(report(rows))


if __name__ == "__main__":
    main()
