"""The command `encoders`; with `--json`, stdout carries one JSON document."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtc.app.options import JsonOption, PluginOption, use_plugins
from vtc.cli.results import show
from vtc.cli.shared import free_stdout, parts

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def encoders(
    model: Annotated[
        str | None, typer.Option(help="tiny-clip, a checkpoint folder, a model of open_clip's, or a hub name.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG|FILE", help="Weights of a model that open_clip knows by name.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Such as 'tome(inside=true)': separated by commas, or repeated; all that act inside it."),
    ] = None,
    retentions: Annotated[
        list[str] | None, typer.Option(help="Patches that leave the encoder, in (0, 1]: by commas, or repeated.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="The same as numbers of patches of an image.")] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures to classify, a sub-folder for each class.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="How classes are called: 'folder = name', or names in order.")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lines around a class, such as 'a photo of a {}.'")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="csv or jsonl of pictures and captions to retrieve.")
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(help="Embedded scenes, where neither --images nor --captions is given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Pictures of a task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures of a batch.")] = None,
    out: Annotated[str | None, typer.Option(metavar="PATH", help="Folder of the results.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random methods.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model of transformers.")] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare methods x retentions inside an encoder: zero-shot classification, retrieval, speed.

    The same command again takes up where the last one ended. The exit status is 1 if something failed.
    """
    from vtc.eval.progress import ConsoleProgress

    given: dict[str, Any] = {
        "model": model,
        "methods": methods or None,
        "retentions": parts(retentions),
        "keep": parts(keep),
        "limit": limit,
        "batch_size": batch_size,
        "out": out,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "plugins": plugin or None,
    }
    use_plugins(plugin or [])
    progress = ConsoleProgress()
    progress.note("importing torch and transformers")
    with free_stdout():
        from vtc.eval.encoders.run import Pictures, run_encoders

        pictures = Pictures(images, classes, templates, captions, scenes)
        settings = {name: value for name, value in given.items() if value is not None}
        try:
            result = run_encoders(settings, pictures, pretrained=pretrained, progress=progress)
        except KeyboardInterrupt:
            progress.note("interrupted; answers so far are stored, the same command goes on from there")
            raise typer.Exit(130) from None
    show(result.results, result.folder, as_json=as_json, result=result)
    if result.failures:
        raise typer.Exit(1)
