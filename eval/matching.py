"""Which cells of two sweeps are the same method at the same budget, and what else the two sweeps did otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtc.eval.results import Results, asked
from vtc.eval.store import Record
from vtc.eval.tables import nominal

WORDS = {
    "parameters": "other hyper-parameters",
    "positions": "another position policy",
    "version": "another version",
}
"""What may differ between two cells of one method."""
SETTINGS = {
    "seed": ("seed", 0),
    "generation": ("generation settings", {}),
    "video": ("video settings", {}),
}
"""Of whole sweeps: in words, and what a store that does not say it had."""
TASK = {"generation": "generation settings", "until": "stop strings", "prompt_profile": "prompt profile"}
"""The same of a task."""


@dataclass(frozen=True)
class Matched:
    """The cells of one task in two sweeps. pairs: key in the second -> in the first; alone: lines without a partner."""

    pairs: Mapping[str, str]
    alone: tuple[list[Record], list[Record]]


def match(task: str, one: Results, other: Results) -> Matched:
    """Pair the scored cells of a task: first those with equal settings, then the only ones left of a label and budget.

    Labels that a sweep only made longer to tell neighbours apart do not count; a budget of another quantity is another.
    """
    sides = [{line["cell"]: line for line in results.lines if line["task"] == task} for results in (one, other)]
    pairs: dict[str, str] = {}
    for about in (_settings, _label):
        groups: dict[Any, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
        for number, (results, taken) in enumerate(((one, set(pairs.values())), (other, set(pairs)))):
            for key in sides[number]:
                if key not in taken:
                    groups[about(results.cells[key])][number].append(key)
        pairs |= {there[0]: here[0] for here, there in groups.values() if len(here) == len(there) == 1}
    paired = set(pairs.values()), set(pairs)
    first, second = ([line for key, line in side.items() if key not in paired[n]] for n, side in enumerate(sides))
    return Matched(pairs, (first, second))


def _budget(cell: Record) -> tuple[Any, ...]:
    return cell["retention"], cell.get("keep"), cell.get("quantity", "tokens")


def _settings(cell: Record) -> tuple[Any, ...]:
    return cell["method"], *_budget(cell), *(repr(_plain(cell.get(name))) for name in WORDS)


def _label(cell: Record) -> tuple[Any, ...]:
    return cell["label"], *_budget(cell)


def _plain(value: Any) -> Any:
    return sorted(value.items()) if isinstance(value, dict) else value


def differing(matched: Sequence[Matched], one: Results, other: Results) -> list[str]:
    """A note for each kind of setting that differs within pairs: the methods, with what it is in both."""
    found: dict[str, set[str]] = {name: set() for name in WORDS}
    for there, here in {pair for each in matched for pair in each.pairs.items()}:
        cells = one.cells[here], other.cells[there]
        for name, changes in found.items():
            if words := _changes(name, *(cell.get(name) for cell in cells)):
                changes.add(f"{cells[1]['label']} ({words})")
    return [
        f"{WORDS[name]} under the same name: {'; '.join(sorted(changes))}" for name, changes in found.items() if changes
    ]


def _changes(name: str, before: Any, now: Any) -> str:
    """What a setting was and is.

    >>> _changes("version", 1, 2), _changes("parameters", {"a": 1, "b": 0}, {"a": 1}), _changes("version", 1, 1)
    ('version 1 -> 2', 'b 0 -> None', '')
    """
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        return ", ".join(filter(None, (_changes(each, before.get(each), now.get(each)) for each in names)))
    return "" if before == now else f"{name} {before} -> {now}"


def lonely(matched: Mapping[str, Matched], wheres: Sequence[object]) -> list[str]:
    """A note for each sweep and set of tasks about the cells there that were compared with nothing."""
    notes = []
    for number, where in enumerate(wheres):
        by_words: dict[str, list[str]] = defaultdict(list)
        for task, each in matched.items():
            if each.alone[number]:
                by_words["; ".join(_written(each.alone[number]))].append(task)
        for words, tasks in by_words.items():
            notes.append(f"compared with nothing, only in {where} ({', '.join(tasks)}): {words}")
    return notes


def _written(lines: Sequence[Record]) -> list[str]:
    """Methods with their budgets.

    >>> base = {"keep": None, "budget": "tokens"}
    >>> _written([{"method": "a", "retention": r, **base} for r in (0.5, 0.25)])
    ['a at 0.5, 0.25']
    """
    budgets: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        budget = asked(line)
        unit = "" if line["budget"] == "tokens" else f" of {line['budget']}"
        budgets[line["method"]].append("" if budget is None else f"{nominal(budget)}{unit}")
    return [f"{method} at {', '.join(each)}" if any(each) else method for method, each in budgets.items()]


def other_settings(tasks: Sequence[str], one: Results, other: Results, wheres: Sequence[object]) -> list[str]:
    """A note for each setting of the sweeps, and of their common `tasks`, that changes what an answer means."""
    notes = []
    for name, (words, default) in SETTINGS.items():
        values = [results.run.get(name, default) for results in (one, other)]
        notes += _unlike(words, values, wheres)
    for task in tasks:
        for name, words in TASK.items():
            values = [results.run["tasks"][task].get(name) for results in (one, other)]
            notes += _unlike(f"{task}: {words}", values, wheres)
    for name in ("dtype", "attention"):
        values = [results.run["model"].get("fingerprint", {}).get(name) for results in (one, other)]
        notes += _unlike(name, values, wheres)
    return notes


def _unlike(words: str, values: Sequence[Any], wheres: Sequence[object]) -> list[str]:
    if values[0] == values[1]:
        return []
    return [f"{words} {values[0]!r} in {wheres[0]}, {values[1]!r} in {wheres[1]}"]
