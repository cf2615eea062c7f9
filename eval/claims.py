"""`python -m vtc.eval.claims SWEEP...` writes what the methods' claims are worth on finished sweeps, as Markdown.

A claim is a comparison of two methods on one task, in `claims.yaml`. It is supported at a retention where the
95 % interval of the paired difference lies above the line, refuted where it lies below, and open where it holds it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from vtc.app.pages import Table, page
from vtc.errors import InputError
from vtc.eval.answers import Answers, answers
from vtc.eval.archive import read_scores
from vtc.eval.comparisons import Pair, paired_series
from vtc.eval.results import Asked, Results, asked

FILE = Path(__file__).with_name("claims.yaml")
CONTROLS = ("random", "stride", "pool", "downsample")
UNTOUCHED = "untouched"
TITLE = "Claims of the methods, measured"
Verdict = Literal["supported", "not supported", "open"]


@dataclass(frozen=True)
class Claim:
    """One comparison that a claim comes down to; `why` stands alone where none can be made."""

    method: str
    claim: str
    task: str = ""
    better: str = ""
    than: str = ""
    within: float = 0.0
    retentions: tuple[Asked, ...] = ()
    why: str = ""
    note: str = ""


def read_claims(path: Path = FILE) -> list[Claim]:
    """The claims of a file; raises InputError for entries with other keys."""
    made = []
    for number, entry in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")), 1):
        try:
            made.append(Claim(**{**entry, "retentions": tuple(entry.get("retentions", ()))}))
        except TypeError as error:
            raise InputError(f"{path.name}, claim {number}: {error}; see the head of the file for the keys") from None
    return made


def base_name(method: str) -> str:
    """A label without the number of its seeds.

    >>> base_name("random, 3 seeds")
    'random'
    """
    return method.split(",")[0]


def differences(data: Answers, better: Iterable[str], than: str) -> list[Pair]:
    """Each of `better` minus `than` at every retention that both have; the untouched model has all of them."""
    places: dict[str, dict[Asked, int]] = {}
    for number, line in enumerate(data.lines):
        places.setdefault(base_name(line["method"]), {})[asked(line)] = number
    other = places.get(than, {})
    whole = data.baseline if than == UNTOUCHED else None
    couples = [(n, other.get(budget, whole)) for name in better for budget, n in places.get(name, {}).items()]
    return paired_series(data, [(n, m) for n, m in couples if m is not None])


def verdict(low: float, high: float, line: float) -> Verdict:
    """What an interval says about being above `line`.

    >>> verdict(1.0, 3.0, 0.0), verdict(-1.0, 3.0, 0.0), verdict(-3.0, -1.0, 0.0)
    ('supported', 'open', 'not supported')
    """
    return "supported" if low > line else "not supported" if high < line else "open"


def judged(claims: Iterable[Claim], results: Results) -> Iterator[list[str]]:
    """Rows of the table, one per claim."""
    known: dict[str, Answers | None] = {}
    for claim in claims:
        words = claim.claim + (f" ({claim.note})" if claim.note else "")
        if claim.why or claim.task not in results.tasks:
            yield [claim.method, words, "-", f"not testable here: {claim.why or 'the task was not swept'}"]
            continue
        if claim.task not in known:
            known[claim.task] = answers(results, claim.task, results.main_metric(claim.task))
        data = known[claim.task]
        found = [] if data is None else differences(data, [claim.better], claim.than)
        found = [pair for pair in found if not claim.retentions or pair.retention in claim.retentions]
        line = f", line at {-claim.within:g}" if claim.within else ""
        shown = f"{claim.task}: {claim.better} minus {claim.than}{line}"
        yield [claim.method, words, shown, "; ".join(_said(pair, -claim.within) for pair in found) or "not swept"]


def _said(pair: Pair, line: float) -> str:
    diff, low, high = (100 * value for value in (pair.diff, pair.low, pair.high))
    return f"{pair.retention}: {diff:+.1f} ({low:+.1f} to {high:+.1f}) {verdict(low, high, line)}"


def losses(results: Results, methods: Collection[str]) -> Iterator[list[str]]:
    """Rows: which of these methods, in any form, a control beats on a task, where the interval leaves no doubt."""
    for task in results.tasks:
        data = answers(results, task, results.main_metric(task))
        if data is None:
            continue
        labels = dict.fromkeys(base_name(line["method"]) for line in data.lines)
        names = [label for label in labels if label.partition("(")[0] in methods]
        for control in CONTROLS:
            worse: dict[str, list[str]] = {}
            for pair in differences(data, names, control):
                if pair.high < 0:
                    worse.setdefault(base_name(pair.one), []).append(f"{pair.retention} ({100 * pair.diff:+.1f})")
            yield from ([task, name, control, ", ".join(where)] for name, where in worse.items())


def document(several: Sequence[Results], claims: Sequence[Claim], command: str) -> str:
    """The page."""
    words = """differences are in points of the task's main metric, paired over questions, with 95 % intervals
    (clustered by picture). "supported": the interval lies above zero (or above the line that the claim draws), "not
    supported": below, "open": it holds the line. Those of these methods that lose to a control are listed behind the
    claims: a control knows nothing of the picture, and only differences whose interval lies below zero count. The
    models are small and the tasks synthetic: a verdict is about the mechanism on them, not about published
    benchmarks."""
    head = ["method", "claim", "measured as", "at retention: difference and verdict"]
    lost = ["task", "method", "loses to", "at retention (points)"]
    parts: list[str | Table] = []
    for results in several:
        name = results.run["model"]["name"]
        counts = ", ".join(f"{task} {results.run['tasks'][task]['documents']}" for task in results.tasks)
        parts += [f"## {name}", f"Questions of each task: {counts}.", (head, judged(claims, results))]
        beaten = losses(results, {claim.method for claim in claims})
        parts += [f"### Methods that lose to a control on {name}", (lost, beaten)]
    names = [results.run["model"]["name"] for results in several]
    title = TITLE if len(names) > 1 else f"{TITLE} on {names[0]}"
    return page(title, command, words, *parts, packages=("torch", "transformers", "lmms-eval"))


def main() -> None:
    """Print the page of one or several sweeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path, nargs="+")
    given = parser.parse_args().sweep
    command = " ".join(["python -m vtc.eval.claims", *map(str, given)])
    sys.stdout.write(document([read_scores(path) for path in given], read_claims(), command))


if __name__ == "__main__":
    main()
