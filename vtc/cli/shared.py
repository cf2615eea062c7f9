"""What several commands of the evaluation package share."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

IncludePath = Annotated[
    list[Path] | None, typer.Option("--include-path", help="Folder with lmms-eval tasks of your own; repeatable.")
]


DataMap = Annotated[
    Path | None,
    typer.Option("--data-map", metavar="FILE", help="YAML with local files in place of tasks' data sets and videos."),
]


def free_stdout() -> contextlib.AbstractContextManager[Any]:
    """Send what libraries print to stderr."""
    return contextlib.redirect_stdout(sys.stderr)
