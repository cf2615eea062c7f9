"""Three or more seeds of one method are one series with a mean and a spread."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from vtc.eval.results import Results, asked
from vtc.eval.store import Record

FEWEST = 3
"""Seeds that make a series; fewer stay methods of their own."""
AVERAGED = ("value", "visual_tokens_in", "visual_tokens_kept", "output_tokens", "flops", "diff", "retained", "tokdense")
KEPT = ("model", "task", "metric", "retention", "keep", "n", "higher_is_better", "positions", "budget", "scoring")


def pools(results: Results, task: str, metric: str) -> list[tuple[list[Record], Record]]:
    """The lines of one metric in their order, each with the lines behind it: several where they are seeds of a method.

    The line of seeds has the means of what is averaged, `seeds`, how many, and `spread`, the standard deviation of
    `value`; intervals and p values, which are about one cell, are None.
    """
    members: dict[str, list[Record]] = defaultdict(list)
    for line in results.select(task, metric):
        members[_but_the_seed(line)].append(line)
    made = []
    for group in members.values():
        if len({line["seed"] for line in group}) >= FEWEST:
            made.append((group, _pooled(group)))
        else:
            made += [([line], line) for line in group]
    return made


def _but_the_seed(line: Record) -> str:
    parameters = {name: value for name, value in json.loads(line["parameters"]).items() if name != "seed"}
    return json.dumps([_name(line["method"]), parameters, asked(line), line["positions"], line["n"]])


def _name(method: str) -> str:
    """A method's name without its seed.

    >>> _name("random(seed=1)"), _name("fastv(layer=2, seed=1)"), _name("random [seed=2]")
    ('random', 'fastv(layer=2)', 'random')
    """
    bare = re.sub(r"\bseed=-?\d+(, *)?|, *seed=-?\d+\b", "", method)
    return re.sub(r" *(\(\)|\[\])", "", bare)


def _pooled(group: Sequence[Record]) -> Record:
    values = [float(line["value"]) for line in group]
    line: Record = {name: None for name in group[0]} | {name: group[0].get(name) for name in KEPT}
    for name in AVERAGED:
        numbers = [float(each[name]) for each in group if each.get(name) is not None]
        line[name] = float(np.mean(numbers)) if len(numbers) == len(group) else None
    method = f"{_name(group[0]['method'])}, {len(group)} seeds"
    return line | {"method": method, "seeds": len(group), "spread": float(np.std(values, ddof=1))}
