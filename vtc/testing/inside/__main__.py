"""`python -m vtc.testing.inside [ENCODER ...]` compares methods inside encoders with plain loops, in tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch

from vtc.app.pages import Table, page
from vtc.testing.contract import raise_on_failure, worst, worst_by
from vtc.testing.encoders import NAMES, PATCHES
from vtc.testing.inside.contract import KEEPS, Cell, check, inside


def report(by_method: Table, by_check: Table, refused: Table, count: int, limit: float) -> str:
    """The document around the tables, of `count` comparisons that stay below `limit`."""
    about = f"""{count} comparisons on tiny random encoders of {PATCHES} patches and three blocks, float32, one CPU
    thread, with {KEEPS[0]} and {KEEPS[1]} patches kept or as the hyper-parameters say. Every method of the registry
    that acts inside an encoder is compared with a plain loop over one image, its blocks and its tokens, in pooled
    outputs and in the rows that leave the last block. A cell above its limit makes the command fail."""
    return page(
        "Methods inside encoders: worst difference per cell",
        "python -m vtc.testing.inside",
        about,
        f"## By method\n\nLimit {limit:.0e}. `*`: something is refused there, as listed below.",
        by_method,
        "## By check\n\nAll methods together; checks for equal bits and numbers have the limit 0 and show 0.",
        by_check,
        "## Refused",
        refused,
        packages=("torch", "transformers", "open_clip_torch", "timm"),
    )


def tables(cells: Sequence[Cell], encoders: Sequence[str]) -> tuple[Table, Table, Table]:
    """By method, by check, and what is refused, with the encoders that refuse it in one row."""
    refused: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        if cell.refused:
            refused.setdefault((cell.method, cell.check, cell.refused), []).append(cell.model)
    rows = [[method, check, ", ".join(models), why] for (method, check, why), models in refused.items()]
    heads = "method", "check", "encoders", "reason"
    return worst_by("method", cells, encoders, _shown), worst_by("check", cells, encoders), (heads, rows)


def _shown(cells: Iterable[Cell]) -> str:
    cells = list(cells)
    return worst(cells) + " *" * any(cell.refused for cell in cells)


def main(encoders: Sequence[str]) -> None:
    """Check every method on `encoders` and print the document; AssertionError names the cells that fail."""
    torch.set_num_threads(1)
    cells: list[Cell] = []
    for encoder in encoders:
        for name in inside(encoder):
            cells += check(name, encoder)
        print(f"{encoder}: {len(cells)} comparisons so far", file=sys.stderr, flush=True)
    raise_on_failure(cells)
    sys.stdout.write(report(*tables(cells, encoders), len(cells), max(cell.limit for cell in cells)))


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
