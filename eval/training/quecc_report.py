"""The page docs/results/quecc.md: QueCC's trained modules against plain pooling to as many tokens, on held-out scenes.

`python -m vtc.eval.training.quecc_report [--out FILE] [--per-family N]` measures everything and writes the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import vtc
from vtc.app.pages import page, table, wrapped
from vtc.eval.tiny.layout import VISUAL_TOKENS
from vtc.eval.training.atp_report import SEED, advantage
from vtc.eval.training.measure import Measurement, measure
from vtc.eval.training.settings import command
from vtc.method import learned, weights
from vtc.method.base import StageView
from vtc.methods.quecc.method import QueCC

MODEL = "tiny-llava"
WEIGHTS = ("quecc-tiny-llava", "quecc-tiny-llava-25")
"""Blocks of 3 x 3 and of 2 x 2 tokens."""
FORMS = ("pool", "trained", "another question")


@dataclasses.dataclass(frozen=True)
class AnotherQuestion(QueCC):
    """The same, but every picture is looked at with the question of the prompt beside it."""

    def question(self, view: StageView) -> Tensor:
        return super().question(view).roll(1, 0)


def compare(name: str, per_family: int, first_seed: int = SEED) -> dict[str, Measurement]:
    """The forms at the number of tokens that the weights are for, on the same questions."""
    trained = learned.load(name)
    assert isinstance(trained, QueCC)
    given = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
    methods = {"pool": vtc.create("pool"), "trained": trained, "another question": AnotherQuestion(**given)}
    share = 1 / trained.stride**2
    return {form: measure(MODEL, methods[form], share, per_family, first_seed=first_seed) for form in FORMS}


def section(name: str, found: Mapping[str, Measurement]) -> str:
    """What was measured about one set of weights, in Markdown."""
    _, about = weights.read(name)
    run, trained = json.loads(about["training"]), found["trained"]
    kept = round(trained.retention * VISUAL_TOKENS)
    gains = [(form, *advantage(trained, found[form])) for form in FORMS if form != "trained"]
    points = [
        [form, f"{100 * mean:+.1f}", f"{100 * (mean - half):+.1f} to {100 * (mean + half):+.1f}"]
        for form, mean, half in gains
    ]
    side = run["parameters"]["stride"]
    return "\n\n".join([
        f"## `{name}`: {side} x {side} tokens become one, {kept} of {VISUAL_TOKENS}",
        wrapped(f"{origin(about)}, {about['seconds']} s on a busy CPU core for the last run:"),
        f"```\n{commands(about)}\n```",
        table(["form", *trained.accuracy], [row(form, found[form]) for form in FORMS]),
        "The trained form against the others on the same questions, in points, with the 95 % interval:",
        table(["against", "points", "interval"], points),
    ])  # fmt: skip


def origin(about: Mapping[str, str]) -> str:
    """How many updates made the weights of this record."""
    runs = [json.loads(about[name]) for name in ("start", "training") if name in about]
    return ", then ".join(f"{run['steps']} updates of {run['batch_size']} questions" for run in runs)


def commands(about: Mapping[str, str]) -> str:
    """What trained weights with this record, the run that they began with first."""
    run = json.loads(about["training"])
    first = [command(json.loads(about["start"]), str(Path(run["start"]).parent))] if "start" in about else []
    return "\n".join([*first, command(run)])


def row(form: str, result: Measurement) -> list[str]:
    """A line of a table: right answers in percent."""
    return [form, *result.percents(result.accuracy)]


ABOUT = """right answers in percent to {questions} questions of tiny_image about held-out scenes, "mean" over the
families, {model} in float32, greedy answers, exact match. The model was frozen while the modules were trained."""
EXPLAINED = """"pool" averages the same blocks, which is what the module does before training. "another question" is the
trained module, which is shown with each picture the question of another prompt of the batch, while the language model
reads the right one: what it loses is what the module gains by following the question; the rest is what it learned to
say about blocks whatever is asked. Where both lines are equal, the gain is all the latter."""
BEGUN = """A module that begins with blocks of its own size learns to say more of every block and lets the question be:
the loss falls without it, and another question costs nothing. The four tokens of blocks of 6 x 6 cannot say everything,
so that a first run on these learns what the question is for; the weights below begin with what it learned."""


def report(untouched: Measurement, found: Mapping[str, Mapping[str, Measurement]]) -> str:
    """The page in Markdown; found: weights -> form -> measurement."""
    return page(
        "QueCC on the embedded model",
        "python -m vtc.eval.training.quecc_report",
        ABOUT.format(questions=len(untouched.right), model=MODEL),
        (["form", *untouched.accuracy], [row("untouched", untouched)]),
        wrapped(EXPLAINED),
        wrapped(BEGUN),
        *(section(name, measured) for name, measured in found.items()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="measure QueCC's trained modules and write the page about them")
    parser.add_argument("--out", type=Path, default=Path("docs/results/quecc.md"))
    parser.add_argument("--per-family", type=int, default=60)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    untouched = measure(MODEL, None, None, given.per_family, first_seed=SEED)
    given.out.write_text(report(untouched, {name: compare(name, given.per_family) for name in WEIGHTS}))
    sys.stdout.write(f"{given.out}\n")


if __name__ == "__main__":
    main()
