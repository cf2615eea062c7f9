"""`python -m vtc.testing [MODEL ...]` runs the whole contract and prints it as Markdown tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from vtc.app.pages import Table, page
from vtc.testing.contract import Deviation, worst_by
from vtc.testing.everything import RETENTION, STEPS, check
from vtc.testing.models import TINY_MODELS


def report(by_method: Table, by_check: Table, count: int, limit: float) -> str:
    """The document around the two tables, of `count` comparisons that stay below `limit`."""
    about = f"""{count} comparisons on tiny random models of every family, float32, one CPU thread, retention
    {RETENTION} or the only one a method takes, {STEPS} decode steps, images and videos; learned methods with fresh
    weights. Methods run with their
    own position policy, greedy, with beams and without a cache; the probes `fixed_keep` and `last_row_top_k`, which
    act at every kind of stage, with all policies and modes. A cell above its limit makes the command fail."""
    return page(
        "Contract: worst difference of logits per cell",
        "python -m vtc.testing",
        about,
        f"## By method\n\nLimit {limit:.0e}.",
        by_method,
        "## By check\n\nAll methods together; checks for equal bits show 0. `-`: not a case of this family.",
        by_check,
        packages=("torch", "transformers"),
    )


def main(models: Sequence[str]) -> None:
    """Check every method and every stage on `models`, one in each process; one table by method, one by check."""
    cells: list[Deviation] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for model, found in zip(models, pool.map(check, models), strict=True):
            cells += found
            print(f"{model}: {len(cells)} comparisons so far", file=sys.stderr, flush=True)
    by_method, by_check = (worst_by(by, cells, models) for by in ("method", "check"))
    sys.stdout.write(report(by_method, by_check, len(cells), max(cell.limit for cell in cells)))


if __name__ == "__main__":
    main(sys.argv[1:] or list(TINY_MODELS))
