"""What filled a KV cache: everything that decides which rows a call drops and how the next ones are numbered."""

from __future__ import annotations

from dataclasses import dataclass

from vtc.method.base import Compressor, Plan, Positions
from vtc.method.budget import Budget, ItemBudgets


@dataclass(frozen=True)
class Maker:
    """A method with its settings, kept as text, so that caches can be compared, copied and stored without it.

    method: with its hyper-parameters. contents: of the files these name. stages, positions, budget: as resolved.
    """

    method: str
    contents: str
    stages: str
    positions: Positions
    budget: Budget | ItemBudgets | None

    @classmethod
    def of(cls, method: Compressor, plan: Plan, budget: Budget | ItemBudgets | None, positions: Positions) -> Maker:
        """Describe what was attached."""
        name = f"{method!r} version {method.version}"
        return cls(name, repr(method.described()), repr(plan.stages), positions, budget)

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" with {self.budget}"
        return f"{self.method}{budget}, positions={self.positions!r}, stages {self.stages}"
