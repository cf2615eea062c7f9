"""The commands `train` and `calibrate`: learned methods on an embedded model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vtc.app.options import PluginOption, SetOption, output_path, use_plugins
from vtc.cli.shared import free_stdout

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def train(
    method: Annotated[str, typer.Option(help="Method to train, atp for example.")],
    out: Annotated[
        str, typer.Option(metavar="PATH", help="Folder of the run: checkpoint, log and weights.safetensors.")
    ],
    set_: SetOption = None,
    plugin: PluginOption = None,
    retention: Annotated[float | None, typer.Option(help="For methods that are trained at one retention.")] = None,
    model: Annotated[str, typer.Option(help="Embedded model.")] = "tiny-llava",
    task: Annotated[str, typer.Option(help="Generated task that it answers, of single words.")] = "tiny_image",
    steps: Annotated[int | None, typer.Option(help="Updates.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions per update, each about a scene of its own.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of the learned parts.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Updates until the rate is reached.")] = None,
    llm_rate: Annotated[float | None, typer.Option(help="Learning rate of the LLM; frozen if left out.")] = None,
    scenes: Annotated[int | None, typer.Option(help="Different training samples.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and questions.")] = None,
    start: Annotated[str | None, typer.Option(help="Weights of another run to begin with, as far as they fit.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to torch.")] = 1,
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
        "start": start,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = TrainingSettings(method, pairs(set_ or [], "--set", method), model=model, task=task, **given)
    with free_stdout():
        path = run(
            folder,
            settings,
            device=device,
            threads=threads,
            check_every=check_every,
            per_family=per_family,
        )
    print(path)


@app.command()
def calibrate(
    out: Annotated[str, typer.Option(metavar="PATH", help="Safetensors file to write.")],
    method: Annotated[str, typer.Option(help="Method to calibrate: atp_training_free or fitprune.")] = (
        "atp_training_free"
    ),
    retention: Annotated[
        float | None, typer.Option(help="Wanted mean over LLM layers and prompts, in (0, 1]; none for fitprune.")
    ] = None,
    set_: SetOption = None,
    model: Annotated[str, typer.Option(help="Embedded model.")] = "tiny-llava",
    task: Annotated[str, typer.Option(help="Generated task that it answers, of single words.")] = "tiny_image",
    prompts: Annotated[int, typer.Option(min=1, help="Questions, each about a training scene of its own.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the questions.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure on an embedded model what a method needs to know: thresholds at one retention, or a recipe for all."""
    from vtc.eval.progress import ConsoleProgress
    from vtc.eval.training.calibrations import calibrate_embedded
    from vtc.method.text import pairs

    file, options = output_path(out), pairs(set_ or [], "--set", method)
    with free_stdout():
        given = model, task, prompts, seed, device, ConsoleProgress()
        path = calibrate_embedded(file, method, retention, options, *given)
    print(path)
