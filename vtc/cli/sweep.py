"""The command `sweep`; with `--json`, stdout carries one JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.app.options import JsonOption, PluginOption, use_plugins
from vtc.cli.results import show, show_series
from vtc.cli.shared import DataMap, IncludePath, free_stdout, parts
from vtc.eval import CONFIGS

if TYPE_CHECKING:
    from vtc.eval.sweep import SweepResult

SHIPPED = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.yaml")))

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def sweep(
    config: Annotated[
        Path | None, typer.Argument(help=f"YAML file, or a shipped one: {SHIPPED}. Options override it.")
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
    from vtc.eval.series import make_series
    from vtc.eval.spec import read_settings

    given: dict[str, Any] = {
        "model": model,
        "methods": methods or None,
        "retentions": parts(retentions),
        "keep": parts(keep),
        "budget": budget,
        "tasks": parts(tasks),
        "limit": limit,
        "batch_size": batch_size,
        "out": out,
        "include_path": include_path or None,
        "data_map": data_map,
        "plugins": plugin or None,
        "trackers": parts(track),
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
    reading = {"frames": frames, "fps": fps, "max_pixels": max_pixels}
    given["video"] = {name: value for name, value in reading.items() if value is not None} or None
    settings = read_settings(config) if config is not None else {}
    options = {name: value for name, value in given.items() if value is not None}
    specs = make_series(settings, options, source=str(config) if config is not None else "vtc sweep")
    use_plugins([plugin for spec in specs for plugin in spec.plugins])
    results: list[SweepResult] = []
    progress = ConsoleProgress()
    progress.note("importing torch, transformers and lmms-eval")
    for spec in specs:
        with free_stdout():
            from vtc.eval.sweep import run_sweep

            try:
                results.append(run_sweep(spec, progress))
            except KeyboardInterrupt:
                progress.note(f"interrupted; answers so far are in {spec.folder}, the same command goes on from there")
                raise typer.Exit(130) from None
        if not as_json:
            show(results[-1].results, spec.folder, as_json=False, result=results[-1])
    if len(specs) > 1:
        show_series(results, as_json=as_json)
    elif as_json:
        show(results[0].results, specs[0].folder, as_json=True, result=results[0])
    if any(result.failures for result in results):
        raise typer.Exit(1)
