"""Putting files where a page, a report or a bench belongs."""

from __future__ import annotations

import os
from pathlib import Path

from vtc.errors import InputError


def write_files(folder: Path, content: dict[str, bytes]) -> None:
    """Replace files of `folder`, which is created if needed, each in one step.

    Raises:
        InputError: one cannot be written.
    """
    for name, data in content.items():
        temporary = folder / f"{name}.new"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, folder / name)
        except OSError as error:
            raise InputError(f"cannot write {str(folder / name)!r}: {error.strerror or error}") from error
