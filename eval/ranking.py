"""`python -m vtc.eval.ranking SWEEP...` ranks the methods of finished sweeps at each of their budgets, as Markdown.

A sweep is its folder, or the file that `vtc.eval.archive` made of it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vtc.app.pages import Table, page
from vtc.eval.answers import Answers, answers
from vtc.eval.archive import read_scores
from vtc.eval.claims import CONTROLS, base_name, differences
from vtc.eval.comparisons import Retained, ranked_tasks, retained
from vtc.eval.results import Asked, Results
from vtc.eval.series import Overall, overall
from vtc.eval.tables import nominal

WHOLE = 99.9
"""Percent of the visual tokens from which on nothing is missing in the prompt."""
FEWEST = 2
"""Methods that make a ranking; budgets of fewer are there for a single comparison."""
HEAD = "method", "percent of untouched", "tokens, %"


def beaten(known: Mapping[str, Answers], names: Sequence[str]) -> dict[tuple[str, Asked], dict[str, list[str]]]:
    """Method and budget -> control -> the tasks on which the control is better without doubt.

    A control knows nothing of the picture. Without doubt: the 95 % interval of the paired difference lies below zero.
    """
    found: dict[tuple[str, Asked], dict[str, list[str]]] = {}
    for task, data in known.items():
        for control in CONTROLS:
            for pair in differences(data, [name for name in names if name not in CONTROLS], control):
                if pair.high < 0:
                    found.setdefault((base_name(pair.one), pair.retention), {}).setdefault(control, []).append(task)
    return found


def rows(
    order: Sequence[Retained], tasks: Sequence[str], lost: Mapping[tuple[str, Asked], Mapping[str, list[str]]]
) -> Iterator[list[str]]:
    """The best first: a line with the mean over tasks, each task, and which controls do better where."""
    for each in order:
        interval = "" if each.low is None else f" ({each.low:.1f} to {each.high:.1f})"
        spread = "" if each.spread is None else f" ± {each.spread:.1f} over seeds"
        losses = lost.get((base_name(each.method), each.retention), {})
        yield [
            each.method,
            f"{each.percent:.1f}{interval}{spread}",
            "-" if each.tokens is None else f"{each.tokens:.0f}",
            *(f"{each.tasks[task]:.1f}" for task in tasks),
            "; ".join(f"{control} ({', '.join(where)})" for control, where in losses.items()) or "-",
        ]


def model_parts(results: Results) -> Iterator[str | Table]:
    """Sections of one model: each budget, methods that leave the prompt whole apart."""
    tasks, name = ranked_tasks(results), results.run["model"]["name"]
    found = {task: answers(results, task, results.main_metric(task)) for task in tasks}
    known = {task: data for task, data in found.items() if data is not None}
    order = retained(results)
    lost = beaten(known, list(dict.fromkeys(base_name(each.method) for each in order)))
    for budget in _budgets(order):
        entries = [each for each in order if each.retention == budget]
        short = [each for each in entries if each.tokens is None or each.tokens < WHOLE]
        whole = [each for each in entries if each not in short]
        for title, chosen in ("", short), (", with a whole prompt", whole):
            if chosen:
                yield f"## {name} at {nominal(budget)}{title}"
                yield (*HEAD, *tasks, "loses to"), rows(chosen, tasks, lost)


def across(several: Sequence[Results]) -> Iterator[str | Table]:
    """Sections over all models: at each budget the methods that every model has there, the best mean first."""
    names = [results.run["model"]["name"] for results in several]
    single = [{(each.method, each.retention): each for each in retained(results)} for results in several]
    entries = overall(several)
    for budget in _budgets(entries):
        lines: dict[str, list[list[str]]] = {"": [], ", with a whole prompt": []}
        for entry in (entry for entry in entries if entry.retention == budget):
            found = [one[entry.method, budget] for one in single]
            whole = all(each.tokens is not None and each.tokens >= WHOLE for each in found)
            percents = (f"{percent:.1f}" for percent in (entry.percent, *(each.percent for each in found)))
            lines[", with a whole prompt" if whole else ""].append([entry.method, *percents])
        for title, chosen in lines.items():
            if chosen:
                yield f"## All models at {nominal(budget)}{title}"
                yield ("method", "mean over tasks", *names), chosen


def _budgets(entries: Sequence[Retained] | Sequence[Overall]) -> list[Asked]:
    """Those that enough methods have, in their order."""
    return [budget for budget, count in Counter(each.retention for each in entries).items() if count >= FEWEST]


def document(several: Sequence[Results], command: str) -> str:
    """The page."""
    told = []
    for results in several:
        documents = ((task, results.run["tasks"][task]["documents"]) for task in ranked_tasks(results))
        told.append(f"{results.run['model']['name']} ({', '.join(f'{task} {count}' for task, count in documents)})")
    about = f"""performance in percent of the untouched model's: ratio per task, then the mean, with 95 % intervals over
    questions. Models and questions: {"; ".join(told)}. "tokens": visual tokens that enter an LLM layer, in the
    mean. "loses to": controls, which know nothing of the picture, that do better without doubt (the 95 % interval of
    the paired difference lies below zero). A method that leaves the prompt whole saves work in the encoder or memory
    behind the prefill; those are ranked apart. A method that cannot meet a budget has no row there. What does not
    stand behind a method's name is its default: without a file of weights there, nothing was calibrated for it. The
    models are small and the tasks are synthetic: an order of mechanisms, not of benchmarks."""
    parts = [*(across(several) if len(several) > 1 else ()), *(part for each in several for part in model_parts(each))]
    return page("All methods, ranked", command, about, *parts, packages=("torch", "transformers", "lmms-eval"))


def main() -> None:
    """Print the page of one or several sweeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path, nargs="+")
    given = parser.parse_args().sweep
    command = " ".join(["python -m vtc.eval.ranking", *map(str, given)])
    sys.stdout.write(document([read_scores(path) for path in given], command))


if __name__ == "__main__":
    main()
