"""What a loaded model told of a sweep's cells, as plain values that any process can be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vtc.eval.cells import Cell, make_cells
from vtc.eval.settling import at
from vtc.eval.spec import SweepSpec
from vtc.eval.store import Record
from vtc.method.base import Positions


class Settled(NamedTuple):
    """What the model added to a cell: its position policy, and how a budget in other units than tokens is met.

    without: tasks whose prompts cannot meet its budget.
    """

    positions: Positions | None
    setting: float | None = None
    achieved: float | None = None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a loaded model told: its fingerprint, and what it added to the cells that can run, by their keys without it.

    tasks: fingerprints by name, as this process found them. left_out: why other cells cannot run, or not on a task.
    """

    model: str
    device: str
    fingerprint: Mapping[str, Any]
    tasks: Mapping[str, str]
    settled: Mapping[str, Settled]
    left_out: tuple[str, ...]

    def cells(self, spec: SweepSpec, task: str = "") -> list[Cell]:
        """The cells of `spec` that can run, as they are stored; of one task where it is named."""
        found = []
        for cell in make_cells(spec, self.fingerprint):
            if (about := self.settled.get(asked := cell.key())) is not None and task not in about.without:
                if about.setting is not None:
                    cell = dataclasses.replace(at(cell, about.setting), achieved=about.achieved, asked=asked)
                found.append(dataclasses.replace(cell, positions=about.positions))
        return found

    def known(self) -> dict[str, Record]:
        """How budgets are met, for processes that need not measure it again; like the cells of a store."""
        return {
            key: {"asked": key, "setting": about.setting, "achieved": about.achieved}
            for key, about in self.settled.items()
            if about.setting is not None
        }
