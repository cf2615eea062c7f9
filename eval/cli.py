"""The commands `sweep`, `report` and `tasks`. With `--json`, stdout carries one JSON document and nothing else."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vtc.eval.results import Results
    from vtc.eval.sweep import SweepResult

app = typer.Typer(add_completion=False, no_args_is_help=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]
IncludePath = Annotated[
    list[Path] | None, typer.Option("--include-path", help="Folder with lmms-eval tasks of your own; repeatable.")
]


@app.command()
def sweep(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file, or a shipped one: default, quick. Options override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="tiny-llava, a local folder or a hub name.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    retentions: Annotated[str | None, typer.Option(help="Fractions kept, in (0, 1], separated by commas.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Task names, separated by commas; see `vtc tasks`.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts per batch.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
    include_path: IncludePath = None,
    positions: Annotated[str | None, typer.Option(help="Position policy: preserve or compact.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random methods and sampling tasks.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods x retentions with the untouched model, and draw a table, a figure and a report.

    The same command again takes up where the last one ended. The exit status is 1 if a cell failed.
    """
    from vtc.eval.progress import ConsoleProgress
    from vtc.eval.spec import make_spec, read_settings

    given: dict[str, Any] = {
        "model": model,
        "methods": _split(methods),
        "retentions": _split(retentions),
        "tasks": _split(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "out": out,
        "include_path": include_path or None,
        "positions": positions,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "revision": revision,
    }
    settings = read_settings(config) if config is not None else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    spec = make_spec(settings, source=str(config) if config is not None else "vtc sweep")
    with _free_stdout():
        progress = ConsoleProgress()
        progress.note("importing torch, transformers and lmms-eval")
        from vtc.eval.sweep import run_sweep

        try:
            result = run_sweep(spec, progress)
        except KeyboardInterrupt:
            progress.note(f"interrupted; what was answered is in {spec.folder}, the same command goes on from there")
            raise typer.Exit(130) from None
    _show(result.results, result.folder, as_json=as_json, result=result)
    if result.failures:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    as_json: JsonFlag = False,
) -> None:
    """Redraw metrics.csv, figure.png and report.html of a sweep from its stored answers and scores."""
    from vtc.eval.report import write_report

    with _free_stdout():
        results = write_report(folder)
    _show(results, folder, as_json=as_json)


@app.command()
def tasks(
    include_path: IncludePath = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also lmms-eval's own generate_until tasks; most need data from the hub.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the tasks that a sweep can name."""
    with _free_stdout():
        from vtc.eval.catalogue import list_tasks

        listed = list_tasks(include_path or (), everything=everything)
    if as_json:
        print(json.dumps(listed, indent=1))
        return
    width = max((len(entry["name"]) for entry in listed), default=0)
    for entry in listed:
        print(f"{entry['name']:{width}}  {entry['kind']:5}  {entry['folder']}")


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _free_stdout() -> contextlib.AbstractContextManager[Any]:
    """Send what libraries print to stderr."""
    return contextlib.redirect_stdout(sys.stderr)


def _show(results: Results, folder: Path, *, as_json: bool, result: SweepResult | None = None) -> None:
    from rich.console import Console

    from vtc.eval.results import json_summary
    from vtc.eval.tables import NOTE, console_table, console_title, nominal

    if as_json:
        summary = {"out": str(folder), **json_summary(results)}
        if result is not None:
            failures = [{k: v for k, v in f.items() if k != "traceback"} for f in result.failures]
            summary |= {"answered": result.answered, "seconds": round(result.seconds, 2), "failures": failures}
        print(json.dumps(summary, indent=1))
        return
    console = Console()
    for task in results.tasks:
        if results.metrics(task):
            console.print(console_title(results, task), highlight=False, soft_wrap=True)
            console.print(console_table(results, task))
            console.print(NOTE, highlight=False, soft_wrap=True)
    for entry in results.incomplete:
        cell = f"{entry.task}, {entry.method} at {nominal(entry.retention)}"
        text = f"incomplete: {cell}: {entry.answered} of {entry.wanted} answers; {entry.reason}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if result is not None:
        console.print(f"{result.answered} answers in {result.seconds:.0f} s", highlight=False)
    console.print(f"{folder / 'report.html'}", highlight=False, soft_wrap=True)
