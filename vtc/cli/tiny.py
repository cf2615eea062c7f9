"""Commands of the small models: `train`, `render`, `check`, `questions` and `table`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vtc.app.options import output_path
from vtc.app.talk import talking
from vtc.embedded import ENCODERS, NAMES, model_path
from vtc.errors import InputError, unknown_name

if TYPE_CHECKING:
    from vtc.eval.tiny.recipes import Recipe
    from vtc.eval.tiny.sample import Task

app = typer.Typer(help="Train and check the embedded models; make their benchmarks.", no_args_is_help=True)


@app.command()
def train(
    out: Annotated[
        str, typer.Option(metavar="PATH", help="Folder of the run: scenes, checkpoint, log and the exported model.")
    ],
    model: Annotated[str, typer.Option(help="Which of the embedded models.")] = NAMES[0],
    steps_tower: Annotated[int | None, typer.Option(help="Steps of the vision tower alone.")] = None,
    steps_joint: Annotated[int | None, typer.Option(help="Steps of the whole model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Scenes per step.")] = None,
    scenes: Annotated[
        int | None, typer.Option(help="Different training scenes (of every task), about 100 kB of disk each.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and questions.")] = 0,
    start: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Embedded model or folder whose tensors of same name and shape come first."),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=SHARE", help="Share of a task in the steps, once per task; the others get none."),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the choice to torch.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Compile the layers; not for tiny-llava.")] = True,
) -> None:
    """Train a model, from nothing or from another one; the same command goes on after an interruption."""
    from vtc.eval.tiny.mixture import train_mixture
    from vtc.eval.tiny.recipes import RECIPES
    from vtc.eval.tiny.settings import Settings
    from vtc.eval.tiny.train import train as run

    if share and model not in RECIPES:
        raise InputError(f"{model} learns one task: leave --share away, or choose {', '.join(RECIPES)} by --model")
    if model in ENCODERS:
        if steps_tower is not None:
            raise InputError(f"{model} has no stage of the tower alone: leave --steps-tower away")
        chosen = {"steps_joint": steps_joint, "batch_size": batch_size, "scenes": scenes, "start": start, "seed": seed}
        typer.echo(str(_train_clip(output_path(out), chosen, device, threads)))
        return
    given: dict[str, Any] = {
        "steps_tower": steps_tower,
        "steps_joint": steps_joint,
        "batch_size": batch_size,
        "different" if model != NAMES[0] else "scenes": scenes,
        "start": start,
        "shares": _shares(share) if share else None,
    }
    if model != NAMES[0]:
        recipe = _recipe(model, seed=seed, **{name: value for name, value in given.items() if value is not None})
        typer.echo(str(train_mixture(output_path(out), recipe, device, threads, compiled=compile)))
        return
    if start is not None:
        raise InputError(f"{model} is trained from nothing: leave --start away, or choose another --model")
    settings = Settings(seed=seed, **{name: value for name, value in given.items() if value is not None})
    typer.echo(str(run(output_path(out), settings, device=device, threads=threads)))


def _shares(given: list[str]) -> tuple[tuple[str, float], ...]:
    from vtc.eval.tiny.tasks import TASKS

    shares = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
        try:
            shares[name] = float(number)
        except ValueError as error:
            raise InputError(f"--share {text!r}: write TASK=SHARE with a number, such as {name}=0.3") from error
        if not 0 < shares[name] < math.inf:
            raise InputError(f"--share {text!r}: a share is above 0; tasks without one get no steps")
    return tuple(shares.items())


def _train_clip(out: Path, given: dict[str, Any], device: str, threads: int) -> Path:
    from vtc.eval.tiny.clip_train import ClipRecipe, train_clip

    recipe = ClipRecipe(**{name: value for name, value in given.items() if value is not None})
    return train_clip(out, recipe, device, threads)


def _recipe(model: str, **given: Any) -> Recipe:
    from vtc.eval.tiny.recipes import RECIPES

    if model not in RECIPES:
        raise unknown_name("model", model, (NAMES[0], *RECIPES))
    return replace(RECIPES[model], **given)


@app.command()
def render(
    out: Annotated[str, typer.Option(metavar="PATH", help="Folder of a run that goes on or will be started.")],
    model: Annotated[str, typer.Option(help="Which of the embedded models.")],
) -> None:
    """Render the samples of a run ahead, so that the training beside it does not have to."""
    from rich.console import Console
    from rich.progress import Progress

    from vtc.eval.tiny.mixed_batches import streams
    from vtc.eval.tiny.stream import render_ahead

    series = streams(_recipe(model), output_path(out) / "samples")
    with Progress(console=Console(stderr=True), disable=not talking()) as bar:
        task = bar.add_task("samples", total=sum(stream.different for stream in series))
        render_ahead(series, lambda count: bar.advance(task, count))


@app.command()
def check(
    model: Annotated[
        str | None, typer.Option(help="Exported folder or name of an embedded model; tiny-llava if left out.")
    ] = None,
    task: Annotated[str, typer.Option(help="Task to answer.")] = "tiny_image",
    per_family: Annotated[int, typer.Option(min=1, help="Questions per family.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    glance: Annotated[
        bool, typer.Option("--glance", help="Show the middle frame of clips, and pictures of 84 px, only.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Write the result into training.json of the folder.")] = False,
) -> None:
    """Measure the score per family on held-out samples through processor and generate."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from vtc.eval.tiny import checking
    from vtc.eval.tiny.benchmark import task_rows
    from vtc.eval.tiny.record import add_accuracy

    folder = model_path(model or NAMES[0]) if model is None or model in NAMES else Path(model)
    rows = task_rows(_task(task), per_family, "check", checking.CHECK_SEED)
    with Progress(console=Console(stderr=True), disable=not talking()) as bar:
        shown = bar.add_task("questions", total=len(rows))
        shares = checking.accuracy(
            folder,
            rows,
            batch_size=batch_size,
            device=device,
            done=lambda count: bar.advance(shown, count),
            task=task,
            glanced=glance,
        )
    table = Table("family", "accuracy")
    for name, share in shares.items():
        table.add_row(name, f"{100 * share:.1f} %")
    Console().print(table)
    if record:
        add_accuracy(folder, shares, per_family, task, glanced=glance)


def _task(name: str) -> Task:
    from vtc.eval.tiny.tasks import TASKS

    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]


@app.command()
def questions(
    out: Annotated[str, typer.Option(metavar="PATH", help="File to write, one JSON object per line.")],
    task: Annotated[str, typer.Option(help="Benchmark task.")] = "tiny_image",
) -> None:
    """Make the questions of a benchmark task."""
    from vtc.eval.tiny.benchmark import QUESTIONS, task_rows, write_rows

    file, rows = output_path(out), task_rows(_task(task), QUESTIONS[_task(task).name])
    write_rows(rows, file)
    typer.echo(f"{len(rows)} questions about {len({row.seed for row in rows})} scenes")


@app.command()
def table(
    folder: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A trained model beside the embedded ones.")
    ] = None,
) -> None:
    """Print the held-out scores that the records of trained models hold, as Markdown."""
    from vtc.eval.tiny.tables import document

    folders = {name: model_path(name) for name in NAMES}
    for given in folder or []:
        name, _, path = given.partition("=")
        if not (Path(path) / "training.json").is_file():
            raise InputError(f"--folder {given!r}: write NAME=PATH with a folder that holds training.json")
        folders[name] = Path(path)
    typer.echo(document(folders), nl=False)
