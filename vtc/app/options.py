"""Options that several commands share, and what turns their text into values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vtc.app.talk import LOG
from vtc.errors import InputError

LONGEST_NAME = 255
"""Bytes that the usual file systems give one name."""

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="Module or .py file that registers methods of your own; repeatable."),
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Hyper-parameter as name=value; repeatable.")]


def use_plugins(names: Sequence[str]) -> None:
    """Import plugins and log which methods each one registers."""
    if not names:
        return
    from vtc.method.plugins import load_plugin  # brings in torch, which most commands do without

    for name in names:
        LOG.info(f"plugin {name}: {', '.join(load_plugin(name))}")


def output_path(given: str | Path) -> Path:
    """A path to write to.

    Raises InputError for an empty text, which would be the folder one is in, and for names no file system takes.
    """
    if not str(given).strip():
        raise InputError("the output path is empty; write the path of a file or folder to make, such as results/first")
    for name in Path(given).parts:
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise InputError(
                f"the output path holds a name of {len(os.fsencode(name))} bytes ({name[:20]}...), more than a file "
                f"system takes ({LONGEST_NAME}); write a shorter one"
            )
    return Path(given)
