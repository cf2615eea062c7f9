"""The commands `report` and `compare`, and what a finished sweep shows; with `--json`, one JSON document on stdout."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.app.options import JsonOption, output_path
from vtc.cli.shared import DataMap, IncludePath, free_stdout
from vtc.errors import InputError

if TYPE_CHECKING:
    from vtc.eval.results import Results
    from vtc.eval.sweep import SweepResult

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Compute all metrics again from the stored answers, without the model.")
    ] = False,
    include_path: IncludePath = None,
    data_map: DataMap = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a bench, whose figures become a section.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Redraw report.html, figures and tables of a sweep from its stored answers and scores."""
    from vtc.eval.report import write_report

    if include_path and not rescore:
        raise InputError("--include-path tells where tasks lie, which only scoring reads; add --rescore")
    if data_map and not rescore:
        raise InputError("--data-map tells where the data of tasks lie, which only scoring reads; add --rescore")
    failures: Sequence[Any] = ()
    with free_stdout():
        if rescore:
            from vtc.eval.progress import ConsoleProgress
            from vtc.eval.rescoring import rescore as run

            failures = run(folder, include_path or (), ConsoleProgress(), data_map)
        results = write_report(folder, bench)
    show(results, folder, as_json=as_json)
    if failures:
        raise typer.Exit(1)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a sweep: another model, or an earlier version.")],
    second: Annotated[Path, typer.Argument(help="Folder of the sweep that is compared with it.")],
    out: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of compare.html and compare.csv; SECOND if left out.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two sweeps of the same tasks, method by method, on the questions that both answered."""
    from vtc.eval.compare import compare as run
    from vtc.eval.compare_report import NOTE, console_table, write_comparison

    folder = output_path(out) if out is not None else second
    with free_stdout():
        found = run(first, second)
        write_comparison(found, folder)
    if as_json:
        rows = [vars(row) for row in found.rows]
        summary = {"out": str(folder), "first": found.first, "second": found.second, "notes": found.notes, "rows": rows}
        print(json.dumps(summary, indent=1))
        return
    from rich.console import Console

    console = Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for note in found.notes:
        say(f"note: {note}")
    for task in dict.fromkeys(row.task for row in found.rows):
        console.print(console_table(found, task), crop=False, no_wrap=True, overflow="ignore")
    say(NOTE)
    say(f"{folder / 'compare.html'} is written; compare.csv lies beside it")


def show(results: Results, folder: Path, *, as_json: bool, result: SweepResult | None = None) -> None:
    from rich.console import Console

    from vtc.eval.tables import NOTE, console_table, console_title, nominal

    if as_json:
        print(json.dumps(summary_of(results, folder, result), indent=1))
        return
    console = Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for task in results.tasks:
        if results.metrics(task):
            say(console_title(results, task))
            console.print(console_table(results, task, console.width), crop=False, no_wrap=True, overflow="ignore")
            say(NOTE)
    for entry in results.outdated:
        say(f"note: {entry}")
    for lost in results.unanswered:
        say(f"left out: {lost.task}, document {lost.doc_id}: {lost.reason}")
    for each in results.incomplete:
        cell = f"{each.task}, {each.method} at {nominal(each.retention)}"
        say(f"incomplete: {cell}: {each.answered} of {each.wanted} answers; {each.reason}")
    if result is not None:
        say(f"{result.answered} answers in {result.seconds:.0f} s")
    say(f"{folder / 'report.html'} is written; metrics.csv, tables and figures lie beside it")


def summary_of(results: Results, folder: Path, result: SweepResult | None) -> dict[str, Any]:
    """A sweep as JSON values."""
    from vtc.eval.results import json_summary

    summary = {"out": str(folder), **json_summary(results)}
    if result is not None:
        failures = [{k: v for k, v in f.items() if k != "traceback"} for f in result.failures]
        summary |= {"answered": result.answered, "seconds": round(result.seconds, 2), "failures": failures}
    return summary


def show_series(results: Sequence[SweepResult], *, as_json: bool) -> None:
    from rich.console import Console

    from vtc.eval.series import overall, overall_table

    means = overall([result.results for result in results])
    if as_json:
        sweeps = [summary_of(each.results, each.folder, each) for each in results]
        print(json.dumps({"sweeps": sweeps, "retained": [vars(mean) for mean in means]}, indent=1))
        return
    console = Console()
    console.print(overall_table(means), crop=False, no_wrap=True, overflow="ignore")
    console.print(
        "percent of the untouched model: ratio per task, then the mean over all tasks of all sweeps, "
        "above its 95 % interval over questions"
    )
