"""The command `cost`: operations, cache, memory and estimated time of a prompt, without a model's weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from vtc.app.options import JsonOption
from vtc.cli.shared import whole_table
from vtc.errors import InputError

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def cost(
    model: Annotated[
        str, typer.Argument(help="Such as llava-1.5-7b (--models lists them), tiny-llava, a folder or config.json.")
    ] = "llava-1.5-7b",
    retention: Annotated[float | None, typer.Option(help="Share of the visual tokens in every layer.")] = None,
    keep: Annotated[int | None, typer.Option(help="Visual tokens in every layer.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Visual tokens from a layer on: 2:128 (FastV), 8:50%,16:25%,24:12.5% (PyramidDrop)."),
    ] = None,
    visual: Annotated[int | None, typer.Option(help="Visual tokens of the prompt.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 60,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated.")] = 1,
    batch: Annotated[int, typer.Option(help="Prompts at once.")] = 1,
    crops: Annotated[
        int | None, typer.Option(help="Crops or frames, where the visual tokens do not tell them.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="For estimated times: v100, a100-40g, a100-80g, h100.")] = "a100-80g",
    element: Annotated[int, typer.Option("--bytes", help="Bytes of a number.")] = 2,
    translate: Annotated[
        str | None, typer.Option(help="A published number in all conventions, such as ffn3_visual=3.82T.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Print published numbers beside ours; exit 1 if one differs.")
    ] = False,
    models: Annotated[bool, typer.Option("--models", help="List the built-in shapes and where they stand.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Operations under every named convention, KV cache, memory, and a roofline estimate of the time."""
    from vtc.app import cost_report as report
    from vtc.cost.published import PUBLISHED
    from vtc.cost.roofline import hardware as device

    if sum((check, models, translate is not None)) > 1:
        raise InputError("--check, --models and --translate are three questions; ask one of them")
    if check:
        found = report.check_report()
        _json(found) if as_json else _print_check(found)
        if not all(row["agrees"] for row in found):
            raise typer.Exit(1)
        return
    if models:
        shapes = [{"name": s.name, "source": s.source, "visual": s.visual, **_llm(s.llm)} for s in PUBLISHED.values()]
        _json(shapes) if as_json else _print_rows(shapes)
        return
    shape = report.load_shape(model)
    if translate is not None:
        data = report.translated(shape, text, translate)
        _json(data) if as_json else _print_translation(data)
        return
    tokens = shape.visual if visual is None else visual
    entering = report.token_counts_of(shape.llm.layers, tokens, retention=retention, keep=keep, steps=layers)
    prompt = report.Prompt(tokens, text, entering, crops, new_tokens, batch, element)
    data = report.cost_report(shape, prompt, device(hardware))
    _json(data) if as_json else _print_cost(data)


def _json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _llm(llm: Any) -> dict[str, int]:
    names = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary")
    return {name: getattr(llm, name) for name in names}


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_rows(entries: list[dict[str, Any]]) -> None:
    """One line for each entry, columns as wide as they need to be: a table would cut them off."""
    texts = [[str(name) for name in entries[0]], *([str(value) for value in entry.values()] for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    for line in texts:
        print("  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def _tera(value: float) -> str:
    """A count in the largest fitting unit.

    >>> _tera(3.817e12), _tera(8.1e9), _tera(250.0)
    ('3.817 T', '8.1 G', '250')
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _print_conventions(data: Mapping[str, Any], *, shares: bool = True) -> None:
    figures = ["FLOPs", "untouched", "share"] if shares else ["FLOPs"]
    table = whole_table("convention", *figures, fold=("unit", "used by"))
    for entry in data["conventions"]:
        against = [_tera(entry["untouched"]), f"{entry['share']:.1%}"] if shares else []
        table.add_row(entry["name"], _tera(entry["flops"]), *against, entry["unit"], entry["users"])
    Console().print(table)


def _print_translation(data: Mapping[str, Any]) -> None:
    where = f"in every layer of {data['model']}, beside {data['text']} of text where a convention counts the prompt's"
    _say(Console(), f"{data['given']}: {data['visual']:.1f} visual tokens {where}")
    _print_conventions(data, shares=False)


def _print_cost(data: Mapping[str, Any]) -> None:
    spans = ", ".join(f"{tokens:g} in {count} layers" for count, tokens in data["layers"])
    console, ours, plain = Console(), data["exact"], data["exact_untouched"]
    _say(console, f"{data['model']}: {data['visual']} visual and {data['text']} text tokens, batch {data['batch']}")
    _say(console, f"visual tokens entering a layer: {data['mean_visual']:.4g} in the mean ({spans})")
    _print_conventions(data)
    table = whole_table("exact", "here", "untouched")
    for name in ("tower", "projector", "llm", "head", "prefill", "decode"):
        table.add_row(f"{name}, operations", _tera(ours[name]), _tera(plain[name]))
    for name, label in (
        ("kv_bytes", "KV cache behind the prefill"),
        ("estimate_activation_bytes", "activations of a layer, estimate"),
        ("estimate_weight_bytes", "weights, estimate"),
    ):
        table.add_row(f"{label}, MB", f"{ours[name] / 1e6:.1f}", f"{plain[name] / 1e6:.1f}")
    here, there = data["estimate_seconds"], data["estimate_seconds_untouched"]
    for name, value in here.items():
        if value:
            label = f"{name.replace('_', ' of ')}, ms on {data['hardware']['name']}, estimate"
            table.add_row(label, f"{1000 * value:.2f}", f"{1000 * there[name]:.2f}")
    console.print(table)
    _say(console, "Times are roofline estimates, not measurements; a method's own cost is not part of them.")


def _print_check(found: list[dict[str, Any]]) -> None:
    _print_rows(
        [
            {
                "": "ok" if row["agrees"] else "DIFFERS",
                "printed": f"{row['printed']:g} {row['unit']}",
                "ours": f"{row['ours']:.6g}",
                "within": f"{row['tolerance']:g}",
                "convention": row["convention"],
                "source": row["source"],
                "what": f"{row['what']} ({row['note']})" if row["note"] else row["what"],
            }
            for row in found
        ]
    )
    print(f"{sum(row['agrees'] for row in found)} of {len(found)} published numbers agree")
