"""The command `doctor`: what this machine and a checkpoint can do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from vtc.app.options import JsonOption, PluginOption, use_plugins

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Embedded model, checkpoint folder or hub name: what runs on it, what does not.")
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention of that model: sdpa, eager, flash_attention_2, ...")
    ] = None,
    plugin: PluginOption = None,
    as_json: JsonOption = False,
) -> None:
    """Versions, devices, attention kernels, extras and caches; for a model which methods are refused, and why.

    A model's weights are neither read nor fetched. The exit status is 1 for a model that no method runs on.
    """
    from vtc.app.doctor import DISTRIBUTION, examine

    use_plugins(plugin or [])
    found = examine(model, attn_implementation=attn_implementation)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _section("versions", {name: version or "not installed" for name, version in found["versions"].items()})
        _section("devices", {device.pop("name"): _facts(device) for device in found["devices"]})
        _section("attention kernels; methods that read attention do not run with eager", found["attention"])
        wanted = {name: ", ".join(missing) for name, missing in found["extras"].items()}
        how = f"; pip install '{DISTRIBUTION}[{{}}]'"
        _section(
            "extras", {name: f"lacks {lacks}{how.format(name)}" if lacks else "there" for name, lacks in wanted.items()}
        )
        note = " (HF_HUB_OFFLINE is set: the hub is not asked)" if found["offline"] else ""
        places = {what: f"{at['path']}{'' if at['there'] else ' (not there)'}" for what, at in found["caches"].items()}
        _section(f"caches{note}", places)
        if model is not None:
            _model(found["model"])
    if model is not None and all(method["refused"] for method in found["model"]["methods"].values()):
        raise typer.Exit(1)


def _facts(device: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if name == "what" else f"{value} {name}" for name, value in device.items())


def _model(found: Mapping[str, Any]) -> None:
    if found["refused"] is not None:
        _section(f"model {found['name']}", {"refused": found["refused"]})
        return
    takes = f", {found['family']}: {' and '.join(found['modalities'])}" if found["family"] else ", an encoder alone"
    lines = {name: _method(method) for name, method in found["methods"].items()}
    _section(f"model {found['name']} ({found['class']}{takes})", lines)


def _method(found: Mapping[str, Any]) -> str:
    if found["refused"] is not None:
        return f"refused: {found['refused']}"
    return f"runs, at retentions above {found['least']:g}" if found["least"] else "runs"


def _section(title: str, lines: Mapping[str, str]) -> None:
    """Names as wide as they need to be, and whole lines behind them, which a terminal breaks if it has to."""
    width = max(map(len, lines))
    print(title)
    for name, text in lines.items():
        print(f"  {name:{width}}  {text}".rstrip())
