"""The counts that a method tells the engine, against what its selections mark."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from vtc.method.view import Selection, StageView
from vtc.testing.between import Select, stand_between
from vtc.testing.measures import Attach, generate


def false_counts(model: Any, inputs: dict[str, Tensor], attach: Attach) -> float:
    """Largest difference between the counts that a method tells the host and the tokens its `keep` marks.

    The engine trusts what it is told: one too few costs the first text token, one too many shows a dropped row. Nothing
    else can notice the former, since the trace, which the oracle follows, lacks that token too.
    """
    worst = 0.0

    def compare(select: Select, view: StageView) -> Selection | None:
        nonlocal worst
        selection = select(view)
        if selection is not None and selection.counts is not None:
            keep = selection.by_head
            marked, told = (keep & view.items.mask[:, None]).sum(2).tolist(), list(selection.counts)
            same = len(marked) == len(told)
            pairs = zip(marked, told, strict=True) if same else [([float("inf")], 0)]
            worst = max(worst, *(abs(each - count) for heads, count in pairs for each in heads))
            # Corrected, so that a stage behind this one is judged by its own answer.
            selection = dataclasses.replace(selection, counts=None)
        return selection

    handle = attach(model)
    stand_between(handle, compare)
    generate(model, inputs, handle, 1)
    return worst
