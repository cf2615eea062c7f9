"""What passes between the engine and a method, for checks that change what it sees or look at what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtc.engine.attach import Handle
from vtc.method.view import Selection, StageView
from vtc.testing.measures import Attach, generate

Select = Callable[[StageView], Selection | None]


class _Between:
    """A method whose `select` goes through `around`; everything else is its own."""

    def __init__(self, method: Any, around: Callable[[Select, StageView], Selection | None]) -> None:
        self._method, self._around = method, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def select(self, view: StageView) -> Selection | None:
        return self._around(self._method.select, view)


def stand_between(handle: Handle, around: Callable[[Select, StageView], Selection | None]) -> None:
    """Let every stage of an attached method, in the encoder and in the LLM, call `around(select, view)`."""
    stages: Any = handle._engine.stages
    for runner in (stages, stages.encoder):
        if runner is not None:
            runner.method = _Between(runner.method, around)


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
            keep = selection.keep if selection.keep.ndim == 3 else selection.keep[:, None]
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
