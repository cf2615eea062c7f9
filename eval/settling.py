"""Budgets in other units than visual tokens: the retention of tokens at which a method costs a share of the untouched.

A share of prefill operations or of cache bytes is counted (`vtc.cost`) from what really enters each layer of some of
the sweep's prompts; a share of time is measured on them. One retention is found for each cell, stored with it, and used
for all questions, also by later sweeps into the same store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from vtc.app.answer import Batch
from vtc.app.preparation import Chat
from vtc.errors import BudgetError, InputError
from vtc.eval.cells import BASELINE, Cell
from vtc.eval.runner import Runner
from vtc.eval.store import Record
from vtc.method.budget import Budget
from vtc.method.composite import Composite

SAMPLE = 4
"""Prompts of each task on which a share is measured, from its beginning."""
STEPS = {"flops": 12, "kv": 12, "time": 6}
"""Halvings of the interval of retentions; a time is not known more exactly than noise allows."""
CLOSE = {"flops": 1e-3, "kv": 1e-3, "time": 2e-2}
"""Differences from the share asked for that need no further halving."""
MISS = {"flops": 1e-2, "kv": 1e-2, "time": 5e-2}
"""By how much the lowest share of a method may exceed the one asked for."""
ROUNDS, FINAL = 5, 9
"""Timed prefills of each prompt, interleaved with those of the untouched model; and at the retention found."""
WORDS = {"flops": "prefill operations", "kv": "KV cache", "time": "prefill time"}
FIELDS = {"flops": "flops_share", "kv": "kv_share"}


class Settler:
    """Finds the retention of each cell on one model. chats: prompts to measure on. stored: cells of earlier sweeps."""

    def __init__(self, runner: Runner, chats: Sequence[Chat], stored: Mapping[str, Record] | None = None) -> None:
        self.runner, self.chats = runner, chats
        self.stored = {cell["asked"]: cell for cell in (stored or {}).values() if cell.get("asked")}
        self._batches: list[Batch] = []

    def settle(self, cell: Cell) -> Cell:
        """The cell with its `setting`; as it is where its budget is of tokens, or it has none.

        Raises:
            BudgetError: the method costs more at every retention that it can meet.
            InputError: the model's family does not tell its sizes, so nothing can be counted.
        """
        if cell.quantity == "tokens" or cell.retention is None:
            return cell
        asked = cell.key()
        if (known := self.stored.get(asked)) is not None:
            return dataclasses.replace(at(cell, known["setting"]), achieved=known["achieved"], asked=asked)
        setting, share = self._found(cell)
        if cell.quantity == "time":
            share = self._measured(at(cell, setting), FINAL)
        return dataclasses.replace(at(cell, setting), achieved=round(share, 6), asked=asked)

    def _found(self, cell: Cell) -> tuple[float, float]:
        target, quantity = cell.retention, cell.quantity
        assert target is not None

        def share_at(retention: float) -> float:
            return self._share(at(cell, retention))

        with contextlib.nullcontext() if quantity == "time" else self.runner.sharing([cell]):
            if target == 1:  # everything is kept, whatever the method itself adds to its cost
                return 1.0, share_at(1.0)
            tried = bisect(share_at, target, steps=STEPS[quantity], close=CLOSE[quantity])
        if not tried or min(tried.values()) > target + MISS[quantity]:
            least = f"takes at least {min(tried.values()):.3f}" if tried else "can meet no retention"
            raise BudgetError(
                f"{target:g} of the untouched model's {WORDS[quantity]} cannot be met by {cell.label!r} here, which"
                f" {least}; ask for more, or for a share of visual tokens with budget=tokens"
            )
        best = min(tried, key=lambda share: (abs(tried[share] - target), share))
        return best, tried[best]

    def _share(self, cell: Cell) -> float:
        """The share of the untouched model's quantity that a cell takes, mean over the prompts."""
        if cell.quantity == "time":
            return self._measured(cell, ROUNDS)
        shares = []
        for chat, batch in zip(self.chats, self.batches, strict=True):
            if cell.scales is not None:
                batch = self.runner.scaled([chat], cell.scales, batch)
                costs = self.runner.spent(batch, None)
            else:
                costs, _ = self.runner.prefill(batch, cell)
            if not costs[0]:
                raise InputError(
                    f"nothing is known of the sizes of model {self.runner.loaded.name!r}, so its costs cannot be "
                    "counted; take budget=tokens or budget=time"
                )
            shares.append(costs[0][FIELDS[cell.quantity]])
        return statistics.fmean(shares)

    def _measured(self, cell: Cell, rounds: int) -> float:
        """The same of prefill time: medians of interleaved runs, which one slow moment of the machine cannot move."""
        plain = dataclasses.replace(cell, label=BASELINE, method=BASELINE, compressor=None)
        ours, theirs = 0.0, 0.0
        for chat, batch in zip(self.chats, self.batches, strict=True):
            small = batch if cell.scales is None else self.runner.scaled([chat], cell.scales, batch)
            times: tuple[list[float], list[float]] = [], []
            for turn in range(rounds + 1):
                pair = self.runner.prefill(small, cell)[1], self.runner.prefill(batch, plain)[1]
                for taken, seconds in zip(times, pair, strict=True):
                    taken += [seconds] if turn else []  # the first round warms up
            ours, theirs = ours + statistics.median(times[0]), theirs + statistics.median(times[1])
        return ours / theirs

    @property
    def batches(self) -> list[Batch]:
        """The prompts, prepared one by one, so that none is padded."""
        self._batches = self._batches or [self.runner.prepare([chat]) for chat in self.chats]
        return self._batches


def bisect(share_at: Callable[[float], float], target: float, *, steps: int, close: float) -> dict[float, float]:
    """Retentions that were tried, and the share at each, while halving an interval in which the share rises.

    A retention that is refused with a BudgetError counts as too low. Ends early at a share `close` to the target.

    >>> tried = bisect(lambda x: 0.2 + 0.8 * x, 0.4, steps=20, close=1e-3)
    >>> round(min(tried, key=lambda x: abs(tried[x] - 0.4)), 3)
    0.25
    """
    low, high, tried = 0.0, 1.0, dict[float, float]()
    for _ in range(steps):
        middle = (low + high) / 2
        try:
            tried[middle] = share_at(middle)
        except BudgetError:
            low = middle
            continue
        if abs(tried[middle] - target) <= close:
            break
        low, high = (middle, high) if tried[middle] < target else (low, middle)
    return tried


def at(cell: Cell, setting: float) -> Cell:
    """The cell at this retention of visual tokens, whatever its budget is a share of."""
    method = cell.compressor
    if isinstance(method, Composite):  # the one part that the sweep gives its budget
        own = Budget(cell.retention)
        budgets = tuple(Budget(setting) if budget == own else budget for budget in method.budgets)
        method = dataclasses.replace(method, budgets=budgets)
        return dataclasses.replace(cell, compressor=method, parameters=method.described(), setting=setting)
    return dataclasses.replace(cell, setting=setting)
