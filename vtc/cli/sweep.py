"""The commands about sweeps, tasks and training; with `--json`, stdout carries one JSON document."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.app.options import JsonOption, PluginOption, SetOption, output_path, use_plugins
from vtc.errors import InputError

if TYPE_CHECKING:
    from vtc.eval.results import Results
    from vtc.eval.sweep import SweepResult

app = typer.Typer(add_completion=False, no_args_is_help=True)

IncludePath = Annotated[
    list[Path] | None, typer.Option("--include-path", help="Folder with lmms-eval tasks of your own; repeatable.")
]


DataMap = Annotated[
    Path | None,
    typer.Option("--data-map", metavar="FILE", help="YAML with local files in place of tasks' data sets and videos."),
]


@app.command()
def sweep(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file, or a shipped one: default, quick. Options override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="tiny-llava, a local folder or a hub name.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Such as 'random,fastv(layer=1),hiprune@0.5+mustdrop': separated by commas, or repeated."),
    ] = None,
    retentions: Annotated[
        list[str] | None, typer.Option(help="Fractions kept, in (0, 1]: separated by commas, or repeated.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Visual tokens kept of each item: separated by commas, or repeated.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="What a retention is a share of: tokens, flops, kv or time (of the prefill).")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Names, see `vtc tasks`: separated by commas, or repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts per batch.")] = None,
    out: Annotated[str | None, typer.Option(metavar="PATH", help="Folder of the results.")] = None,
    include_path: IncludePath = None,
    data_map: DataMap = None,
    plugin: PluginOption = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Send metrics to wandb, tensorboard, ...: separated by commas, or repeated."),
    ] = None,
    positions: Annotated[str | None, typer.Option(help="Position policy: preserve, compact or compact_input.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random methods and sampling tasks.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video, at most; 32 of a file by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of video, instead of even distances.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Pixels of a frame; larger ones are scaled down.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ..., balanced over all GPUs.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    engine: Annotated[str | None, typer.Option(help="Where workers run: local, ray.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that answer, each with the model.")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPUs of each, 0.5 for two on one.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods x retentions with the untouched model, and draw a table, a figure and a report.

    The same command again takes up where the last one ended. The exit status is 1 if a cell failed.
    """
    from vtc.eval.progress import ConsoleProgress
    from vtc.eval.spec import make_spec, read_settings

    given: dict[str, Any] = {
        "model": model,
        "methods": methods or None,
        "retentions": _split(retentions),
        "keep": _split(keep),
        "budget": budget,
        "tasks": _split(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "out": out,
        "include_path": include_path or None,
        "data_map": data_map,
        "plugins": plugin or None,
        "trackers": _split(track),
        "positions": positions,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "revision": revision,
        "engine": engine,
        "workers": workers,
        "gpus_per_worker": gpus_per_worker,
        "address": address,
    }
    settings = read_settings(config) if config is not None else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    reading = {"frames": frames, "fps": fps, "max_pixels": max_pixels}
    reading = {name: value for name, value in reading.items() if value is not None}
    if reading:
        settings["video"] = {**(settings.get("video") or {}), **reading}
    spec = make_spec(settings, source=str(config) if config is not None else "vtc sweep")
    use_plugins(spec.plugins)
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
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Compute all metrics again from the stored answers, without the model.")
    ] = False,
    include_path: IncludePath = None,
    data_map: DataMap = None,
    as_json: JsonOption = False,
) -> None:
    """Redraw report.html, figures and tables of a sweep from its stored answers and scores."""
    from vtc.eval.report import write_report

    if include_path and not rescore:
        raise InputError("--include-path tells where tasks lie, which only scoring reads; add --rescore")
    if data_map and not rescore:
        raise InputError("--data-map tells where the data of tasks lie, which only scoring reads; add --rescore")
    failures: Sequence[Any] = ()
    with _free_stdout():
        if rescore:
            from vtc.eval.progress import ConsoleProgress
            from vtc.eval.rescoring import rescore as run

            failures = run(folder, include_path or (), ConsoleProgress(), data_map)
        results = write_report(folder)
    _show(results, folder, as_json=as_json)
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
    with _free_stdout():
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


@app.command()
def tasks(
    include_path: IncludePath = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also lmms-eval's own generate_until tasks; most need data from the hub.")
    ] = False,
    path: Annotated[
        bool, typer.Option("--path", help="Print the folder of the built-in tasks, for lmms-eval's --include_path.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the tasks that a sweep can name: local ones, and the benchmark groups with what each task needs."""
    if path:
        from vtc.eval import TASKS

        print(TASKS)
        return
    with _free_stdout():
        from vtc.eval.catalogue import list_tasks
        from vtc.eval.suite import BENCHMARKS, GROUPS, HEAD, rows

        listed = list_tasks(include_path or (), everything=everything)
    if as_json:
        groups: list[dict[str, Any]] = [{"name": name, "kind": "group", "folder": ""} for name in GROUPS]
        known = {entry["name"]: entry for entry in [*listed, *groups]}
        for benchmark in BENCHMARKS:
            known[benchmark.name] = {"kind": "task", "folder": ""} | known.get(benchmark.name, {}) | benchmark.record()
        print(json.dumps(list(known.values()), indent=1))
        return
    width = max((len(entry["name"]) for entry in listed), default=0)
    for entry in listed:
        print(f"{entry['name']:{width}}  {entry['kind']:5}  {entry['folder']}")
    for group, title in GROUPS.items():
        lines = [HEAD, *rows(group)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        print(f"\n{group}: {title} of lmms-eval (*: only asked where rules cannot read an answer)")
        for line in lines:
            print("  ".join(f"{cell:{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())


@app.command()
def train(
    method: Annotated[str, typer.Option(help="Method to train, atp for example.")],
    out: Annotated[
        str, typer.Option(metavar="PATH", help="Folder of the run: scenes, checkpoint, log and weights.safetensors.")
    ],
    set_: SetOption = None,
    plugin: PluginOption = None,
    retention: Annotated[float | None, typer.Option(help="For methods that are trained at one retention.")] = None,
    model: Annotated[str, typer.Option(help="Embedded model.")] = "tiny-llava",
    steps: Annotated[int | None, typer.Option(help="Updates.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions per update, each about a scene of its own.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of the learned parts.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Updates until the rate is reached.")] = None,
    llm_rate: Annotated[float | None, typer.Option(help="Learning rate of the LLM; frozen if left out.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Different training scenes, 85 kB of disk each.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and questions.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to torch.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes that render scenes; 0 for none.")] = 0,
    check_every: Annotated[int, typer.Option(help="Updates between checks on held-out scenes; 0 for none.")] = 200,
    per_family: Annotated[int, typer.Option(help="Questions per family of a check.")] = 40,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a learned method on an embedded model and its scenes; the same command goes on after an interruption."""
    from vtc.eval.training.settings import TrainingSettings
    from vtc.eval.training.trainer import train as run
    from vtc.method.text import pairs

    folder = output_path(out)
    use_plugins(plugin or [])
    given: dict[str, Any] = {
        "retention": retention,
        "steps": steps,
        "batch_size": batch_size,
        "rate": rate,
        "warmup": warmup,
        "llm_rate": llm_rate,
        "scenes": scenes,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = TrainingSettings(method, pairs(set_ or [], "--set", method), model=model, **given)
    with _free_stdout():
        path = run(
            folder,
            settings,
            device=device,
            threads=threads,
            workers=workers,
            check_every=check_every,
            per_family=per_family,
        )
    print(path)


@app.command()
def calibrate(
    out: Annotated[str, typer.Option(metavar="PATH", help="Safetensors file to write.")],
    retention: Annotated[float, typer.Option(help="Wanted mean over LLM layers and prompts, in (0, 1].")],
    set_: SetOption = None,
    model: Annotated[str, typer.Option(help="Embedded model.")] = "tiny-llava",
    prompts: Annotated[int, typer.Option(min=1, help="Questions, each about a training scene of its own.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure the constant thresholds of atp_training_free with mode=calibrated on an embedded model."""
    from vtc.eval.training.calibration import calibrate_embedded
    from vtc.method.text import pairs

    file, options = output_path(out), pairs(set_ or [], "--set", "atp_training_free")
    with _free_stdout():
        path = calibrate_embedded(file, retention, options, model, prompts, seed, device)
    print(path)


def _split(texts: list[str] | None) -> list[str] | None:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()] if texts else None


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
