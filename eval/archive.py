"""Sweeps as single small files: `python -m vtc.eval.archive FOLDER... --out DIRECTORY` packs finished ones.

A packed sweep has the scores of every document, from which tables, rankings and intervals are drawn again, and not the
answers themselves, which take ten times the room.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

from vtc.errors import InputError
from vtc.eval.results import Results, read_results
from vtc.eval.store import Store

SUFFIX = ".tar.xz"
FILES = ("run.json", "cells.jsonl", "metrics.jsonl", "failures.jsonl")


def pack(folder: Path, out: Path) -> Path:
    """Write the scores of a sweep's folder to `out`/NAME.tar.xz, where NAME is the folder's; returns the file.

    The same scores make the same bytes.

    Raises:
        InputError: the folder holds no sweep.
    """
    Store(folder).run()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{folder.name}{SUFFIX}"
    with tarfile.open(path, "w:xz", preset=9) as packed:
        for name in FILES:
            if (folder / name).exists():
                packed.add(folder / name, name, filter=_plain)
    return path


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without whose file it was and when."""
    entry.mtime, entry.mode = 0, 0o644
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def read_scores(path: Path) -> Results:
    """The results of a sweep's folder, or of a file of `pack`; there every answer counts as missing.

    Raises:
        InputError: it is neither.
    """
    if path.is_dir() or not path.name.endswith(SUFFIX):
        return read_results(path)
    try:
        with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as packed:
            packed.extractall(folder, filter="data")
            return read_results(Path(folder))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{path}: not readable: {error}; `python -m vtc.eval.archive FOLDER` packs a sweep") from error


def main() -> None:
    """Pack folders and print the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for folder in given.folder:
        sys.stdout.write(f"{pack(folder, given.out)}\n")


if __name__ == "__main__":
    main()
