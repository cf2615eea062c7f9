"""`python -m vtc.eval.mini.report FOLDER` describes a finished `vtc sweep mini`, as Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vtc.app.pages import Table, page
from vtc.embedded import MINI_ADAPTER
from vtc.eval.cells import BASELINE
from vtc.eval.mini.adapter import about
from vtc.eval.ranking import model_parts
from vtc.eval.results import Results, read_results
from vtc.eval.tiny.benchmark import QUESTIONS, task_rows
from vtc.eval.tiny.tables import chance
from vtc.eval.tiny.tasks import TASKS


def families(results: Results, task: str) -> Iterator[list[str]]:
    """Family, chance and accuracy of the untouched model with its interval, in percent."""
    guess = chance(task_rows(TASKS[task], QUESTIONS[task]))
    for family in TASKS[task].graded:
        for line in results.select(task, family):
            if line["method"] == BASELINE:
                value, low, high = (100 * line[name] for name in ("value", "ci_low", "ci_high"))
                yield [task, family, f"{100 * guess[family]:.0f}", f"{value:.1f} ({low:.0f} to {high:.0f})"]


def document(results: Results, made: dict[str, str]) -> str:
    """The page; made: what the file of the adapter says of its run."""
    told = ", ".join(f"{task} {results.run['tasks'][task]['documents']}" for task in results.tasks)
    words = f"""mini-llava (576 visual tokens, 30 LLM layers) with the adapter that ships, from step {made["step"]} of
    stage "{made["stage"]}" after {int(made["seconds"]) / 3600:.1f} hours of training. Questions: {told},
    about pictures that training never saw, answers compared as a whole. First what the untouched model knows, since
    nothing can be lost where it guesses; `chance` is the share of the most frequent answer. Then performance in percent
    of the untouched model's: ratio per task, then the mean, with 95 % intervals over questions, which are wide here.
    "tokens": visual tokens that enter an LLM layer, in the mean, in percent of 576. "loses to": controls that do better
    without doubt."""
    known: Table = (
        ("task", "family", "chance", "untouched"),
        [row for t in results.tasks for row in families(results, t)],
    )
    parts = ("## What the untouched model knows", known, *model_parts(results))
    return page(
        "mini-llava: methods at 192, 128 and 64 of 576 tokens",
        "python -m vtc.eval.mini.report results/mini",
        words,
        *parts,
        packages=("torch", "transformers", "lmms-eval"),
    )


def main() -> None:
    """Print the page of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    results = read_results(parser.parse_args().folder)
    sys.stdout.write(document(results, about(MINI_ADAPTER)))


if __name__ == "__main__":
    main()
