"""`python -m vtc.eval.documents` writes the documents that are made of the code alone; `make docs` runs it.

Those that hold measurements have a command each, which they name; `make results` runs all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from vtc.app.catalogue import describe_methods
from vtc.app.method_pages import method_pages
from vtc.eval.columns import column_page
from vtc.eval.suite import task_page

DOCUMENTS: Mapping[str, Callable[[], str]] = {
    "methods.md": lambda: method_pages(describe_methods()),
    "columns.md": column_page,
    "tasks.md": task_page,
}
"""Name of a file in docs -> what makes its text."""


def main(folder: Path = Path("docs")) -> None:
    """Write all of them into `folder`."""
    for name, make in DOCUMENTS.items():
        (folder / name).write_text(make(), encoding="utf-8")
        sys.stdout.write(f"{folder / name}\n")


if __name__ == "__main__":
    main()
