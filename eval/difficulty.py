"""Which questions need their tokens: a perfect budget for each question, and groups by what down-sampling loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vtc.eval.answers import Answers
from vtc.eval.cells import BASELINE
from vtc.eval.downsample import DOWNSAMPLE
from vtc.eval.results import Asked, asked


@dataclass(frozen=True)
class Oracle:
    """What a method reaches that is told for each question the least retention that answers as well as untouched.

    value: in the metric's scale; tokens: mean over questions. It is a bound: no method knows this of a new question.
    """

    method: str
    value: float
    tokens: float
    untouched_tokens: float


def oracles(data: Answers) -> list[Oracle]:
    """The bound of each method with two retentions or more; where none is as right as untouched, untouched answers."""
    if data.baseline is None or data.kept is None:
        return []
    reference, everything = data.scores[data.baseline], data.kept[data.baseline]
    made = []
    for method in dict.fromkeys(line["method"] for line in data.lines if line["method"] != BASELINE):
        series = [number for number, line in enumerate(data.lines) if line["method"] == method]
        if len(series) < 2:
            continue
        scores = np.vstack([data.scores[series], reference])
        kept = np.vstack([data.kept[series], everything])
        usable = np.where(scores >= reference, kept, np.inf)
        least = usable.argmin(axis=0)
        picked = least, np.arange(len(reference))
        made.append(Oracle(method, float(scores[picked].mean()), float(kept[picked].mean()), float(everything.mean())))
    return made


@dataclass(frozen=True)
class Group:
    """Accuracy of each method on one group of questions at one retention.

    name: "A" where the untouched model is right and down-sampling to as many visual tokens is wrong, "B" where both are
    right. accuracy: share right by method, the control included. questions: how many there are.
    """

    retention: Asked
    name: str
    questions: int
    accuracy: Mapping[str, float]


def groups(data: Answers) -> list[Group]:
    """The difficulty groups of VTC-Bench (2510.07143) at each retention that has a cell of `downsample`.

    Right is a score of more than half of the highest one.
    """
    if data.baseline is None:
        return []
    right = data.scores > 0.5 * data.top
    made = []
    for control, line in enumerate(data.lines):
        if line["method"].split(" ")[0] != DOWNSAMPLE:
            continue
        easy = right[control]
        rivals = {
            other["method"]: number
            for number, other in enumerate(data.lines)
            if asked(other) == asked(line) and number != data.baseline
        }
        for name, members in (("A", right[data.baseline] & ~easy), ("B", right[data.baseline] & easy)):
            count = int(members.sum())
            shares = {method: float(right[n][members].mean()) for method, n in rivals.items()} if count else {}
            made.append(Group(asked(line), name, count, shares))
    return made
