"""`python -m vtc.eval.encoders.page FOLDER` writes what a finished `vtc encoders` found as a document in Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vtc.app.pages import page
from vtc.eval.cells import BASELINE
from vtc.eval.results import Results, asked, budget_order, read_results
from vtc.eval.store import Record
from vtc.eval.tables import nominal, significant

SPEED = "images_per_second"
COMMAND = "python -m vtc.eval.encoders.page results/encoders"
ABOUT = """behind `vtc encoders --scenes 300 --retentions 0.75,0.5,0.25,0.11,0.05 --out results/encoders`. Accuracies in
per cent; a star stands for a difference from the untouched model that holds after Holm's correction (p < 0.05), the
brackets for its 95 % interval, on the same pictures. `patches`: how many leave the last block. `FLOPs`: of an image's
encoding, in per cent of the untouched model's. `images/s`: one divided by the median over batches, every batch encoded
by all cells in turn on one thread of a CPU that other work shared, and in brackets in per cent of the untouched
model's; with so few patches it says little of larger models. The model is `tiny-clip`, its pictures are held out from
training: `scenes_colour`, `scenes_form`, `scenes_digit` and `scenes_word` ask which one colour, form, digit or word a
scene shows, `scenes_retrieval` seeks two captions of each of all scenes, and their scenes."""
FIGURE = "![Accuracy against FLOPs](encoders.png)"


class Section(NamedTuple):
    """One task: its name, the heads of its columns and its rows."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def report(sections: Sequence[Section]) -> str:
    """The document."""
    parts = [part for section in sections for part in (f"## {section.title}", (section.head, section.rows))]
    packages = ("torch", "open_clip_torch")
    return page("Methods inside an encoder", COMMAND, ABOUT, FIGURE, *parts, packages=packages)


def sections(results: Results) -> list[Section]:
    """A section for every task with metrics, a row for every cell: the untouched model, then method by method."""
    return [_section(results, task) for task in results.tasks if results.metrics(task)]


def _section(results: Results, task: str) -> Section:
    main = results.main_metric(task)
    metrics = [metric for metric in results.metrics(task) if metric != SPEED]
    lines = {(metric, line["cell"]): line for metric in (*metrics, SPEED) for line in results.select(task, metric)}
    cells = [line for line in results.select(task, main)]
    order = list(dict.fromkeys(line["method"] for line in cells))
    cells.sort(key=lambda line: (line["method"] != BASELINE, order.index(line["method"]), budget_order(asked(line))))
    rows = [_row(line, metrics, lines) for line in cells]
    n = cells[0]["n"] if cells else 0
    return Section(f"{task}: {n} pictures", head(metrics), rows)


def head(metrics: Sequence[str]) -> list[str]:
    """The heads of the columns of a task with these metrics, the main one first."""
    return ["method", "retention", *metrics, f"difference in {metrics[0]}", "patches", "FLOPs", "images/s"]


def _row(line: Record, metrics: Sequence[str], lines: dict[tuple[str, str], Record]) -> list[str]:
    untouched = line["method"] == BASELINE
    values = []
    for metric in metrics:
        each = lines[metric, line["cell"]]
        values.append(f"{100 * each['value']:.1f}{'*' if not untouched and significant(each) else ''}")
    difference = ""
    if line["diff"] is not None:
        low, high = (f"{100 * line[f'diff_ci_{end}']:+.1f}" for end in ("low", "high"))
        difference = f"{100 * line['diff']:+.1f} [{low}, {high}]"
    speed = lines[SPEED, line["cell"]]
    share = "" if speed["retained"] is None else f" ({speed['retained']:.0f})"
    return [
        "untouched" if untouched else line["method"],
        "" if untouched else nominal(asked(line)),
        *values,
        difference,
        f"{line['visual_tokens_kept']:.0f}",
        f"{100 * line['flops_share']:.0f}",
        f"{speed['value']:.0f}{share}",
    ]


def main() -> None:
    """Print the document of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a finished vtc encoders")
    sys.stdout.write(report(sections(read_results(parser.parse_args().folder))))


if __name__ == "__main__":
    main()
