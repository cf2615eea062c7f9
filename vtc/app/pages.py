"""Generated documents in Markdown: a title, the command that made it, what it was made on, and tables from rows."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from importlib import metadata

Table = tuple[Sequence[str], Iterable[Sequence[str]]]
"""Heads of the columns, and rows of as many cells."""
WIDTH = 120


def page(title: str, command: str, about: str, *parts: str | Table, packages: Sequence[str] = ()) -> str:
    """A document: `title`, "Made by `command`: `about`" as one paragraph, then `parts`, blank lines between them.

    packages: whose versions end the paragraph.
    """
    words = f"Made by `{command}`: {about}"
    if packages:
        words += f" {', '.join(f'{name} {version(name)}' for name in packages)}."
    return "\n\n".join([f"# {title}", wrapped(words), *map(_text, parts)]) + "\n"


def wrapped(text: str) -> str:
    """One paragraph in lines of at most `WIDTH` characters."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["method", "ms"], [["random", "1.2"]]))
    | method | ms |
    |---|---|
    | random | 1.2 |
    """
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])


def version(package: str) -> str:
    """The version of an installed package without its local part."""
    return metadata.version(package).split("+")[0]


def _text(part: str | Table) -> str:
    return part if isinstance(part, str) else table(*part)
