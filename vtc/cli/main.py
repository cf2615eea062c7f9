"""The command `vtc`. Errors the library raises on purpose become one line on stderr and a non-zero exit status."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import sys
import traceback
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vtc.app.options import JsonOption, PluginOption, SetOption, use_plugins
from vtc.app.talk import LOG, show
from vtc.cli.shared import clip, whole_table
from vtc.errors import InputError, VTCError

app = typer.Typer(
    name="vtc",
    help="Visual-token compression for multimodal language models, and the benchmark that measures it. "
    "Any command takes --quiet, which leaves out bars and notes, and --debug, which shows tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        import vtc

        print(vtc.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def methods(
    pattern: Annotated[str, typer.Argument(help="A name; * stands for any letters, as in 'vq*'.")] = "*",
    stage: Annotated[str | None, typer.Option(help="Those that act at encoder, pre_llm, llm or cache.")] = None,
    trained: Annotated[
        bool | None, typer.Option("--trained/--untrained", help="Those on learned weights, or all others.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Those that run on this family of models.")] = None,
    as_json: JsonOption = False,
    long: Annotated[bool, typer.Option("--long", help="Print each method's whole description.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the descriptions as one document.")] = False,
    plugin: PluginOption = None,
) -> None:
    """List compression methods: where they act, what they need, on which families they run."""
    from vtc import adapters
    from vtc.app.catalogue import describe_methods, list_methods
    from vtc.app.method_pages import method_pages

    use_plugins(plugin or [])
    entries = describe_methods(list_methods(pattern, stage=stage, trained=trained, family=family))
    if as_json:
        _print_json(entries)
        return
    if markdown:
        sys.stdout.write(method_pages(entries))
        return
    console = Console()
    if long:
        for entry in entries:
            console.print(f"[bold]{escape(entry['name'])}[/bold] (version {entry['version']})", highlight=False)
            console.print(f"{entry['description']}\n", markup=False, highlight=False)
        return
    families = len(adapters.families())
    table = whole_table("method", fold=("acts", "reads", "families", "what it does"))
    for entry in entries:
        cells = [", ".join(entry[key]) or "-" for key in ("stages", "needs")]
        where = "all" if len(entry["families"]) == families else ", ".join(entry["families"])
        name = entry["name"] + ("*" if entry["trained"] else "")
        table.add_row(*map(escape, (name, *cells, where, entry["summary"])))
    table.caption = "* runs on learned weights"
    console.print(table)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List embedded models, supported model families, and encoders without an LLM."""
    from vtc.app.catalogue import describe_models

    entries = describe_models()
    if as_json:
        _print_json(entries)
        return
    caption = "* embedded; the classes' names end in ForConditionalGeneration"
    table = whole_table("name", "class", fold=("towers", "modalities", "attention"))
    table.caption = caption
    encoders = whole_table("encoder without an LLM", fold=("classes",))
    for entry in entries:
        if entry["kind"] == "encoder":
            encoders.add_row(entry["name"], ", ".join(entry["classes"]))
            continue
        classes = ", ".join(name.removesuffix("ForConditionalGeneration") for name in entry["classes"])
        mark = "*" if entry["kind"] == "embedded" else ""
        cells = [", ".join(entry[key]) or "-" for key in ("towers", "modalities", "vision_attention")]
        table.add_row(*map(escape, (entry["name"] + mark, classes, *cells)))
    Console().print(table)
    Console().print(encoders)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL; repeat the option for several.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video or animation; repeat the option for several.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames read of each video, at most.")] = 8,
    fps: Annotated[float | None, typer.Option(help="Frames per second, instead of even distances.")] = None,
    model: Annotated[str, typer.Option(help="Embedded model, checkpoint folder or hub name.")] = "tiny-llava",
    method: Annotated[
        str | None, typer.Option(help="Compression method, such as vtc_cls, or several, such as hiprune@0.5+mustdrop.")
    ] = None,
    retention: Annotated[float | None, typer.Option(help="Fraction of visual tokens kept, in (0, 1].")] = None,
    keep: Annotated[int | None, typer.Option(help="Visual tokens kept per image, instead of a retention.")] = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    positions: Annotated[str | None, typer.Option(help="preserve, compact or compact_input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ..., balanced over all GPUs.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, flash_attention_2, ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about images or videos, with or without compression."""
    from vtc.app.answer import answer, open_image
    from vtc.app.loading import load
    from vtc.method.text import attachable, pairs

    use_plugins(plugin or [])
    options = pairs(set_ or [], "--set", method)
    if method is None and (retention is not None or keep is not None or options or positions is not None):
        raise InputError("retention, keep, positions and --set belong to a method; name one with --method")
    limits: dict[str, Any] = {"retention": retention, "keep": keep}
    chosen, granted = (None, limits) if method is None else attachable(method, options, **limits)
    if not image and not video:
        raise InputError("no --image and no --video given; compression needs something to look at")
    images = [open_image(path) for path in image or []]
    videos = [clip(path, frames, fps) for path in video or []]
    loaded = load(model, device=device, dtype=dtype, attn_implementation=attn_implementation, revision=revision)
    extra: dict[str, Any] = {"positions": positions} if positions is not None else {}
    extra |= {"videos": videos, "method": chosen, "max_new_tokens": max_new_tokens}
    result = answer(loaded, images, prompt, **granted, **extra)
    if as_json:
        _print_json({"model": model, "method": method, **limits, **dataclasses.asdict(result)})
        return
    print(result.text)
    share = result.visual_tokens_kept / result.visual_tokens_in if result.visual_tokens_in else 1.0
    kept = f"{result.visual_tokens_kept:g} of {result.visual_tokens_in} visual tokens ({share:.1%})"
    LOG.info(f"{kept}, {result.seconds:.2f} s")


def _mount() -> None:
    """Add the commands of the evaluation package; its heavy imports wait until a command runs."""
    from vtc.cli import bench, cost, doctor, encoders, ledger, mini, results, show, sweep, tasks, tiny, train

    for room in (doctor, show, sweep, encoders, results, ledger, tasks, cost, bench, train):
        app.registered_commands.extend(room.app.registered_commands)
    app.add_typer(tiny.app, name="tiny")
    app.add_typer(mini.app, name="mini")


_mount()


def main() -> None:
    """Entry point: 0 on success, 1 for a failure inside a run, 2 for input that is refused."""
    debug, quiet = "--debug" in sys.argv, "--quiet" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--debug", "--quiet")]
    show(logging.WARNING if quiet else logging.DEBUG if debug else logging.INFO)
    try:
        app(args=arguments)
    except VTCError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"vtc: error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("vtc: interrupted\n")
        raise SystemExit(130) from None
    except OSError as error:
        if debug:
            traceback.print_exc()
        named = error.errno == errno.ENAMETOOLONG
        problem = f"the name {str(error.filename)[:60]!r}... is too long for a file; write a shorter one"
        kind = f"unexpected {type(error).__name__}: {error} (run again with --debug for a traceback)"
        sys.stderr.write(f"vtc: {f'error: {problem}' if named else kind}\n")
        raise SystemExit(2 if named else 1) from None
    except ImportError as error:
        if debug:
            traceback.print_exc()
        extra = "this command needs the evaluation extra: pip install 'visual-token-compression[eval]'"
        sys.stderr.write(f"vtc: error: {error}; {extra}\n")
        raise SystemExit(2) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"vtc: unexpected {type(error).__name__}: {error} (run again with --debug for a traceback)\n")
        raise SystemExit(1) from None
