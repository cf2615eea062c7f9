"""`python -m vtc.testing [MODEL ...]` runs the whole contract and prints it as Markdown tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import transformers

from vtc.testing.contract import Deviation
from vtc.testing.everything import RETENTION, STEPS, check
from vtc.testing.models import TINY_MODELS

HEAD = """# Contract: worst difference of logits per cell

Made by `python -m vtc.testing`: {count} comparisons on tiny random models of every family, float32, one CPU thread,
retention {retention}, {steps} decode steps, images and videos; learned methods with fresh weights. Methods run with
their own position policy, greedy, with beams and without a cache; the probes `fixed_keep` and `last_row_top_k`, which
act at every kind of stage, with all policies and modes. A cell above its limit makes the command fail.
torch {torch}, transformers {transformers}.

## By method

Limit {limit:.0e}.
"""


def main(models: Sequence[str]) -> None:
    """Check every method and every stage on `models`, one in each process; one table by method, one by check."""
    cells: list[Deviation] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for model, found in zip(models, pool.map(check, models), strict=True):
            cells += found
            print(f"{model}: {len(cells)} comparisons so far", file=sys.stderr, flush=True)
    facts = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    limit = max(cell.limit for cell in cells)
    print(HEAD.format(count=len(cells), retention=RETENTION, steps=STEPS, limit=limit, **facts))
    _table(cells, "method", dict.fromkeys(cell.method for cell in cells), models)
    print("\n## By check\n\nAll methods together; checks for equal bits show 0. `-`: not a case of this family.\n")
    _table(cells, "check", dict.fromkeys(cell.check for cell in cells), models)


def _table(cells: Sequence[Deviation], by: str, rows: Iterable[str], models: Sequence[str]) -> None:
    print(f"| {by} | " + " | ".join(models) + " |")
    print("|---" * (len(models) + 1) + "|")
    for row in rows:
        worst = [_worst(cell for cell in cells if (getattr(cell, by), cell.model) == (row, model)) for model in models]
        print(f"| {row} | " + " | ".join(worst) + " |")


def _worst(cells: Iterable[Deviation]) -> str:
    found = [cell.worst for cell in cells]
    if not found:
        return "-"
    return f"{max(found):.1e}" if max(found) else "0"


if __name__ == "__main__":
    main(sys.argv[1:] or list(TINY_MODELS))
