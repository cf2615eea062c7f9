"""What several commands of the evaluation package share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

IncludePath = Annotated[
    list[Path] | None, typer.Option("--include-path", help="Folder with lmms-eval tasks of your own; repeatable.")
]


DataMap = Annotated[
    Path | None,
    typer.Option("--data-map", metavar="FILE", help="YAML with local files in place of tasks' data sets and videos."),
]


def whole_table(*whole: str, fold: Sequence[str] = ()) -> Table:
    """A table that cuts nothing off: columns `whole` on one line, those of `fold` on as many as they need."""
    return Table(*(Column(head, no_wrap=True) for head in whole), *(Column(head, overflow="fold") for head in fold))


def free_stdout() -> contextlib.AbstractContextManager[Any]:
    """Send what libraries print to stderr."""
    return contextlib.redirect_stdout(sys.stderr)


def clip(path: str, frames: int, fps: float | None) -> Any:
    """The frames of a video, evenly spaced or so many per second."""
    from vtc.app.media import read_video

    if fps is None:
        return read_video(path, frames=frames)
    return read_video(path, "fps", frames=frames, fps=fps)


def parts(texts: list[str] | None) -> list[str] | None:
    """The parts between commas of an option that may be repeated; None where it was not given."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()] if texts else None
