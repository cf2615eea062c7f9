"""Commands of mini-llava: `build`, `train` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.app.options import output_path
from vtc.app.talk import LOG

app = typer.Typer(
    help="A LLaVA of LLaVA-1.5's geometry from two small pretrained models (extra `mini`).", no_args_is_help=True
)


@app.command()
def build(
    out: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Folder; vtc/mini-llava or vtc/mini-llava-untrained in the user's cache."),
    ] = None,
    adapter: Annotated[
        str,
        typer.Option(metavar="FILE", help="Trained parts to merge in; embedded: those that ship; none: none of them."),
    ] = "embedded",
    downloads: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder of the fetched files; in the user's cache.")
    ] = None,
) -> None:
    """Fetch DINOv2-S/14 and SmolLM2-135M, join them, and write a checkpoint folder that transformers loads."""
    from vtc.embedded import MINI_ADAPTER
    from vtc.eval.mini.build import build as run
    from vtc.eval.mini.build import cache_folder

    chosen = {"embedded": MINI_ADAPTER, "none": None}.get(adapter, Path(adapter))
    folder = output_path(out) if out else cache_folder(trained=chosen is not None)
    fetched = output_path(downloads) if downloads else cache_folder().with_name("mini-llava-downloads")
    typer.echo(str(run(folder, fetched, chosen, LOG.info)))


@app.command()
def train(
    out: Annotated[str, typer.Option(metavar="PATH", help="Folder of the run: features, checkpoint, log, adapter.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="What `vtc mini build --adapter none` wrote; in the user's cache."),
    ] = None,
    steps_align: Annotated[int | None, typer.Option(help="Steps of the projector alone.")] = None,
    steps_coarse: Annotated[int | None, typer.Option(help="Steps of both that read a quarter of the rows.")] = None,
    steps_joint: Annotated[int | None, typer.Option(help="Steps of projector and language model.")] = None,
    batch_joint: Annotated[int | None, typer.Option(help="Pictures per step with the language model.")] = None,
    pictures: Annotated[int | None, typer.Option(help="Different pictures, 0.44 MB of disk each.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and questions.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to torch.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train projector and low-rank changes; the same command goes on after an interruption."""
    from vtc.eval.mini.build import cache_folder
    from vtc.eval.mini.settings import Settings
    from vtc.eval.mini.train import train as run

    given: dict[str, Any] = {"steps_align": steps_align, "steps_coarse": steps_coarse, "steps_joint": steps_joint}
    given |= {"batch_joint": batch_joint, "pictures": pictures}
    settings = Settings(seed=seed, **{name: value for name, value in given.items() if value is not None})
    base = model or cache_folder(trained=False)
    typer.echo(str(run(output_path(out), base, settings, device=device, threads=threads)))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, which may go on.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="File to write for `vtc mini build --adapter`.")],
) -> None:
    """Write what a run has learned so far."""
    from vtc.eval.mini.train import export as write

    typer.echo(str(write(run, output_path(out))))
