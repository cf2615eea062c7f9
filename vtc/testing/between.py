"""What passes between the engine and a method, for checks that change what it sees or look at what it answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtc.engine.handle import Handle
from vtc.method.view import Selection, StageView

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
