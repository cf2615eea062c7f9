"""`python -m vtc.testing.dispatch` counts the torch operations that every method's selection dispatches, as JSON.

Tokens add none; greedy steps and steps of a merge do, and are as many in all sizes here. An item adds those that lay
its geometry beside that of the others, where a method reads it. What reads a tensor back is counted apart.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtc.testing.released import SelectionCase, fresh
from vtc.testing.released.cases import selection_cases
from vtc.testing.views import Shape

SMALL, LARGE = Shape(((1, 6, 6),)), Shape(((1, 12, 12),))
TILES = Shape(((5, 6, 6),), tiling=(2, 2))
STEPS = 12
READS = {"aten._local_scalar_dense.default", "aten.nonzero.default"}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def dispatched(case: SelectionCase, shape: Shape, batch: int) -> Counter[str]:
    """Operations of one selection by name; the number of steps does not depend on the shape."""
    ((crops, rows, columns),) = shape.regions
    length = crops * rows * columns
    options = dict(case.options)
    if "iterations" in options:
        options["iterations"] = 1
    if "retain" in options:
        options["retain"] = length // 2
    keep = _keep(case, crops, length)
    scene = dataclasses.replace(case, options=options).scene(shape, batch, keep=keep, width=64)
    counting = Counting()
    with torch.no_grad():
        scene.method.select(fresh(scene.view))  # what depends on the shape alone is kept from here on
        view = fresh(scene.view)
        with counting:
            scene.method.select(view)
    return counting.names


def read_back(names: Counter[str]) -> int:
    """Of these operations, those that read tensors back."""
    return sum(names[each] for each in READS)


def _keep(case: SelectionCase, crops: int, length: int) -> int:
    if case.steps:
        number = STEPS * (crops if getattr(case.method, "scope", "item") == "crop" else 1)
        return number if case.steps == "kept" else length - number
    if case.wide:
        return length // 4  # the same share takes the same number of halvings
    return int(length * case.share)


def shapes(case: SelectionCase) -> list[Shape]:
    """What a case is counted on."""
    return [SMALL] if case.one_crop else [SMALL, TILES]


def per_item(case: SelectionCase) -> int:
    """Operations that one more item adds: its geometry lies in tensors of its own, which are laid side by side."""
    few, many = (dispatched(case, SMALL, batch).total() for batch in (2, 5))
    return (many - few) // 3


def counts() -> dict[str, tuple[int, int, int]]:
    """Case -> operations for two items, of one crop or of tiles, those for one item more, and those that read back."""
    found = {}
    for name, case in selection_cases().items():
        seen = [dispatched(case, shape, 2) for shape in shapes(case)]
        found[name] = max(each.total() for each in seen), per_item(case), max(map(read_back, seen))
    return found


def main() -> None:
    """Print the table."""
    lines = [f"{json.dumps(name)}: {json.dumps(each)}" for name, each in counts().items()]
    sys.stdout.write("{\n  " + ",\n  ".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
