"""Two sweeps side by side: two models, or two versions of the library, on the same tasks."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vtc.errors import InputError
from vtc.eval.answers import Answers, answers, draws
from vtc.eval.cells import BASELINE
from vtc.eval.comparisons import ends, paired_series, resampled_ratio
from vtc.eval.matching import Matched, differing, lonely, match, other_settings
from vtc.eval.results import Asked, Results, asked, plain_text, read_results
from vtc.eval.store import Record


@dataclass(frozen=True)
class Compared:
    """One metric of one method at one retention in both sweeps; every difference is the second minus the first.

    method: its name in the sweep that needs the shorter one. n: documents that both scored, on which all of it is
    computed where scores by document are stored; otherwise values are as stored and low, high and p None. retained:
    percent of the untouched model of the same sweep. p_holm: corrected for all methods and retentions of the metric.
    """

    task: str
    metric: str
    method: str
    retention: Asked
    n: int
    first: float
    second: float
    diff: float
    diff_low: float | None = None
    diff_high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    first_retained: float | None = None
    second_retained: float | None = None
    retained_diff: float | None = None
    retained_low: float | None = None
    retained_high: float | None = None
    first_tokens: float | None = None
    second_tokens: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All of two sweeps that can be compared; `notes` say what cannot, and what else differs."""

    first: str
    second: str
    rows: Sequence[Compared]
    notes: Sequence[str]

    def select(self, task: str, metric: str) -> list[Compared]:
        """The rows of one metric of one task."""
        return [row for row in self.rows if (row.task, row.metric) == (task, metric)]


def compare(first: Path, second: Path) -> Comparison:
    """Compare the sweeps in two folders on the tasks, methods and retentions that both have.

    Raises:
        InputError: a folder holds no sweep, no task, method or document is in both, a task is not the same in both, or
            another scoring computed its metrics.
    """
    one, other = read_results(first), read_results(second)
    common = [task for task in one.tasks if task in other.tasks]
    if not common:
        raise InputError(
            f"{str(first)!r} and {str(second)!r} have no task in common: {', '.join(one.tasks)} there,"
            f" {', '.join(other.tasks)} here; sweep the same tasks"
        )
    for task in common:
        _check_same_task(task, one, other, str(first), str(second))
    matched = {task: match(task, one, other) for task in common}
    rows = [
        row
        for task in common
        for metric in _metrics(task, one, other)
        for row in _rows(task, metric, one, other, matched[task])
    ]
    if not rows:
        raise InputError(
            f"{str(first)!r} and {str(second)!r} share no scored method at the same retention on the same documents of"
            f" {', '.join(common)}; `vtc report` shows what each has"
        )
    notes = [*_notes(one, other, first, second), *other_settings(common, one, other, (first, second))]
    notes += [*differing(list(matched.values()), one, other), *lonely(matched, (first, second))]
    notes += _left_out(common, rows, one, other)
    return Comparison(*_names(one, other, first, second), rows, notes)


def _check_same_task(task: str, one: Results, other: Results, first: str, second: str) -> None:
    prints = [results.run["tasks"][task]["fingerprint"] for results in (one, other)]
    if prints[0] != prints[1]:
        raise InputError(
            f"task {task!r} is not the same in both: fingerprint {prints[0]} in {first!r}, {prints[1]} in {second!r};"
            " its settings, code or data changed between the sweeps, so sweep one of them again"
        )
    scorings = [{line["scoring"] for line in results.lines if line["task"] == task} for results in (one, other)]
    if scorings[0] and scorings[1] and scorings[0] != scorings[1]:
        words = [" and ".join(sorted(each)) for each in scorings]
        raise InputError(
            f"task {task!r} was scored by {words[0]} in {first!r} and by {words[1]} in {second!r};"
            " `vtc report --rescore` computes metrics again from the stored answers"
        )


def _metrics(task: str, one: Results, other: Results) -> list[str]:
    """Metrics of both, the one by which the task is judged first."""
    there = other.metrics(task)
    return sorted((m for m in one.metrics(task) if m in there), key=lambda m: m != one.main_metric(task))


def _names(one: Results, other: Results, first: Path, second: Path) -> tuple[str, str]:
    names = str(one.run["model"]["name"]), str(other.run["model"]["name"])
    return names if names[0] != names[1] else (f"{names[0]} in {first}", f"{names[1]} in {second}")


def _notes(one: Results, other: Results, first: Path, second: Path) -> list[str]:
    notes = []
    for results, rival, where in ((one, other, first), (other, one, second)):
        if alone := [task for task in results.tasks if task not in rival.tasks]:
            notes.append(f"only in {where}: {', '.join(alone)}")
    for task in one.tasks:
        counts = [results.run["tasks"].get(task, {}).get("documents") for results in (one, other)]
        if None not in counts and counts[0] != counts[1]:
            notes.append(
                f"{task}: {counts[0]} documents in {first}, {counts[1]} in {second}; compared on those of both"
            )
    versions = [results.run["sweeps"][-1].get("versions", {}) for results in (one, other)]
    changed = [f"{name} {there} -> {versions[1].get(name)}" for name, there in versions[0].items()
               if versions[1].get(name) != there]  # fmt: skip
    if changed:
        notes.append(f"library versions: {', '.join(changed)}")
    return notes


def _left_out(tasks: Sequence[str], rows: Sequence[Compared], one: Results, other: Results) -> list[str]:
    """A note for each task of which some metric has no row."""
    notes = []
    for task in tasks:
        shown = {row.metric for row in rows if row.task == task}
        if absent := [m for m in dict.fromkeys([*one.metrics(task), *other.metrics(task)]) if m not in shown]:
            notes.append(
                f"{task}: no cell is about the same documents in both, as far as is stored, in {', '.join(absent)}"
            )
    return notes


def _rows(task: str, metric: str, one: Results, other: Results, matched: Matched) -> list[Compared]:
    first, second = (answers(results, task, metric, pool=False) for results in (one, other))
    if first is None or second is None:
        return _as_stored(task, metric, one, other, matched)
    common = [doc_id for doc_id in first.doc_ids if doc_id in set(second.doc_ids)]
    if not common:
        return []
    return _paired(task, metric, first.only(common), second.only(common), matched)


def _paired(task: str, metric: str, first: Answers, second: Answers, matched: Matched) -> list[Compared]:
    both = dataclasses.replace(
        first, lines=[*first.lines, *second.lines], scores=np.vstack([first.scores, second.scores]), kept=None
    )
    shift = len(first.lines)
    there = {line["cell"]: number for number, line in enumerate(first.lines)}
    partners = [there.get(matched.pairs.get(line["cell"], "")) for line in second.lines]
    couples = [(shift + n, partner) for n, partner in enumerate(partners) if partner is not None]
    found = paired_series(both, couples)
    means = both.scores.mean(axis=1)
    sums, sizes = both.cluster_sums()
    totals, noise = draws(len(sizes)) @ sums.T, np.random.default_rng(0)
    bases = (first.baseline, None if second.baseline is None else shift + second.baseline)
    better = bool(first.lines[0]["higher_is_better"])
    ranked = better and None not in bases and all(means[base] > 0 for base in bases if base is not None)
    rows = []
    for (b, a), pair in zip(couples, found, strict=True):
        line, old = both.lines[b], both.lines[a]
        row = Compared(
            task, metric, _name(old, line), asked(line), len(both.doc_ids), float(means[a]), float(means[b]),
            pair.diff, pair.low, pair.high, pair.p, pair.p_holm,
            first_tokens=old["visual_tokens_kept"], second_tokens=line["visual_tokens_kept"],
        )  # fmt: skip
        if ranked and line["method"] != BASELINE:
            percent = [100 * float(means[n] / means[base]) for n, base in zip((a, b), bases, strict=True)]
            drawn = [
                resampled_ratio(totals[:, [n, base]], sums[[n, base]], sizes, both.top, noise)
                for n, base in zip((a, b), bases, strict=True)
                if base is not None
            ]
            low, high = ends(drawn[1] - drawn[0])
            row = dataclasses.replace(
                row, first_retained=percent[0], second_retained=percent[1], retained_diff=percent[1] - percent[0],
                retained_low=low, retained_high=high,
            )  # fmt: skip
        rows.append(row)
    return rows


def _name(old: Record, line: Record) -> str:
    """The shorter name: a longer one only tells a cell from neighbours that the other sweep does not have."""
    return min(str(line["method"]), str(old["method"]), key=len)


def _as_stored(task: str, metric: str, one: Results, other: Results, matched: Matched) -> list[Compared]:
    """Rows without intervals, of cells about as many documents: nothing is known of each document."""
    there = {line["cell"]: line for line in one.select(task, metric)}
    rows = []
    for line in other.select(task, metric):
        old = there.get(matched.pairs.get(line["cell"], ""))
        if old is None or old["n"] != line["n"]:
            continue
        percent = old["retained"], line["retained"]
        rows.append(Compared(
            task, metric, _name(old, line), asked(line), line["n"], old["value"], line["value"],
            line["value"] - old["value"], first_retained=percent[0], second_retained=percent[1],
            retained_diff=None if None in percent else percent[1] - percent[0],
            first_tokens=old["visual_tokens_kept"], second_tokens=line["visual_tokens_kept"],
        ))  # fmt: skip
    return rows


def comparison_csv(comparison: Comparison) -> str:
    """The rows as CSV; what does not exist is empty."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Compared)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_text(getattr(row, name)) for name in names} for row in comparison.rows)
    return text.getvalue()
