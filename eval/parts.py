"""`python -m vtc.eval.parts SWEEP` writes what the stages of methods do, alone and together, as Markdown.

The sweep is that of `vtc sweep parts`, or any with several forms of a method: its folder, or a packed one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vtc.app.pages import Table, page
from vtc.eval.answers import Answers, answers
from vtc.eval.archive import read_scores
from vtc.eval.cells import BASELINE
from vtc.eval.results import Asked, Results, asked
from vtc.eval.store import Record

HEAD = ["task", "form", "at", "score", "95 %", "tokens", "TokDense", "FLOPs", "KV", "fewer"]


def forms(data: Answers) -> dict[str, dict[Asked, list[int]]]:
    """Method -> budget -> its series, in the order of the sweep; the untouched model is no method."""
    found: dict[str, dict[Asked, list[int]]] = {}
    for number, line in enumerate(data.lines):
        if line["method"] != BASELINE:
            at = found.setdefault(line["method"].partition("(")[0], {})
            at.setdefault(asked(line), []).append(number)
    return found


def rows(results: Results, method: str) -> Iterator[list[str]]:
    """The forms of a method on every task, budget by budget."""
    for task in results.tasks:
        data = answers(results, task, results.main_metric(task))
        for series in ({} if data is None else forms(data).get(method, {})).values():
            for number in series:
                assert data is not None
                yield [task, *_row(data.lines[number]), _fewer(data, number, series[0])]


def _row(line: Record) -> list[str]:
    interval = f"{100 * line['ci_low']:.1f} to {100 * line['ci_high']:.1f}"
    shares = [f"{line[name]:.0%}" for name in ("flops_share", "kv_share")]
    kept, density = f"{line['visual_tokens_kept']:.1f}", f"{line['tokdense']:.2f}"
    return [line["method"], str(asked(line) or "-"), f"{100 * line['value']:.1f}", interval, kept, density, *shares]


def _fewer(data: Answers, number: int, first: int) -> str:
    """Share of the questions on which a series has fewer tokens than the first; the first, than the untouched model."""
    other = data.baseline if number == first else first
    if data.kept is None or other is None:
        return "-"
    return f"{(data.kept[number] < data.kept[other]).mean():.0%}"


def document(results: Results, command: str) -> str:
    """The page."""
    counts = ", ".join(f"{task} {results.run['tasks'][task]['documents']}" for task in results.tasks)
    words = f"""{results.run["model"]["name"]}, questions of each task: {counts}. "at": the retention asked for, if any
    is. "tokens": visual tokens entering a layer, mean over layers and questions. "TokDense": score over tokens.
    "FLOPs", "KV": of the prefill, as shares of the untouched model's. "fewer": share of the questions on which a form
    has fewer tokens than the first form at that budget; in the line of the first, than the untouched model."""
    names = dict.fromkeys(line["method"].partition("(")[0] for line in results.lines if line["method"] != BASELINE)
    tables: list[str | Table] = []
    for name in names:
        tables += [f"## {name}", (HEAD, rows(results, name))]
    return page("Parts of the methods", command, words, *tables, packages=("torch", "transformers", "lmms-eval"))


def main() -> None:
    """Print the page of a sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    path = parser.parse_args().sweep
    sys.stdout.write(document(read_scores(path), f"python -m vtc.eval.parts {path}"))


if __name__ == "__main__":
    main()
