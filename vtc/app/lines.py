"""The document that counts what each method takes in code."""

from __future__ import annotations

import inspect
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import vtc.methods
from vtc.app.pages import page
from vtc.method.registry import METHODS

ABOUT = """lines of Python that hold code: no blank lines, comments or docstrings, but imports. A method that has a
folder has all files of it counted, and methods that share a file share its lines. Tensor functions that several methods
use lie in `vtc/ops` and are counted for none."""
LAYOUT = tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER


def code_lines(source: str) -> int:
    """Lines that hold code.

    >>> code_lines('# all\\nimport this\\n\\ndef f():\\n    "Nothing."\\n    return (1,\\n            2)\\n')
    4
    """
    held: set[int] = set()
    begins = True
    for kind, _, (first, _), (last, _), _ in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind == tokenize.NEWLINE:
            begins = True
        elif kind not in LAYOUT:
            if not (begins and kind == tokenize.STRING):  # a statement that is a string: a docstring
                held.update(range(first, last + 1))
            begins = False
    return len(held)


def files(name: str) -> list[Path]:
    """The files of a method: its own, or all of its folder."""
    file = Path(inspect.getfile(METHODS.get(name)))
    return [file] if file.parent == Path(vtc.methods.__file__).parent else sorted(file.parent.glob("*.py"))


def lines_page() -> str:
    """Markdown: a line for each method, the shortest first."""
    return page("Lines of code", "make docs", ABOUT, (["method", "lines", "files"], _rows()))


def _rows() -> Iterator[list[str]]:
    sources = {name: [file.read_text(encoding="utf-8") for file in files(name)] for name in METHODS.names()}
    counts = {name: sum(map(code_lines, texts)) for name, texts in sources.items()}
    for name in sorted(counts, key=lambda name: (counts[name], name)):
        yield [f"`{name}`", str(counts[name]), str(len(sources[name]))]
