"""`--data-map`: which local files stand in for a task's data sets, and which folder for its videos.

One mapping in YAML. A key is a task, a group or tag of tasks, or a data set as the task's code names it, with or
without its configuration; a task's own entry comes first. A value is a path, or `data` and `media`::

    pope: pope.parquet
    lmms-lab-encoder/GQA:testdev_balanced_images: gqa/images      # what the code of gqa loads besides
    videomme: {data: videomme.jsonl, media: clips/videomme}
    mvbench: {media: clips/mvbench}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vtc.errors import InputError, shown
from vtc.eval.local_rows import FORMATS

EXAMPLE = "'pope: pope.parquet' or 'videomme: {data: videomme.jsonl, media: clips}'"


@dataclass(frozen=True)
class Entry:
    """What stands under one key; each is None where the entry does not say it."""

    key: str
    data: Path | None = None
    media: Path | None = None


@dataclass(frozen=True)
class DataMap:
    """The entries by key, and where they come from."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    source: str = "data_map"

    @property
    def names(self) -> list[str]:
        """Keys that are names of tasks, groups or tags; the others are data sets."""
        return [key for key in self.entries if "/" not in key]

    def data(self, names: Sequence[str], path: str, configuration: str | None, *, own: bool) -> Entry | None:
        """The entry for a data set that the code of the task `names[0]` loads; the other `names` are its groups.

        own: it is the one with the questions, for which the task's name stands as well.
        """
        keys = [*(names if own else ()), *([f"{path}:{configuration}"] if configuration else []), path]
        found = (self.entries[key] for key in keys if key in self.entries)
        return next((entry for entry in found if entry.data is not None), None)

    def media(self, names: Sequence[str], path: str) -> Path | None:
        """The folder with the videos of a task whose questions are in the data set `path`."""
        found = (self.entries[key] for key in (*names, path) if key in self.entries)
        return next((entry.media for entry in found if entry.media is not None), None)


def read_data_map(given: Path | Mapping[str, Any] | None) -> DataMap:
    """The data map in a YAML file, whose relative paths start at its folder, or in a mapping, where they start here.

    Raises:
        InputError: a file that is missing or not YAML, an entry that is no path, or a path where nothing lies.

    >>> read_data_map({"pope": ".", "videomme": {"media": "."}}).names
    ['pope', 'videomme']
    """
    if given is None:
        return DataMap()
    if isinstance(given, Mapping):
        return _entries(given, "data_map", Path())
    try:
        content = yaml.safe_load(given.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"data map {str(given)!r} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"data map {str(given)!r} holds {shown(content)}; write lines such as {EXAMPLE}")
    return _entries(content, f"data map {str(given)!r}", given.parent)


def _entries(content: Mapping[Any, Any], source: str, folder: Path) -> DataMap:
    entries = {}
    for key, value in content.items():
        where = f"{source}: {shown(key)}"
        parts = value if isinstance(value, Mapping) else {"data": value}
        if not isinstance(key, str) or not parts or not set(parts) <= {"data", "media"}:
            raise InputError(f"{where} is given {shown(value)}; write a line such as {EXAMPLE}")
        paths = {name: _path(part, f"{where}, {name}", folder) for name, part in parts.items()}
        if "data" in paths and paths["data"].is_file() and paths["data"].suffix not in FORMATS:
            raise InputError(
                f"{where}: {str(paths['data'])!r} is none of {', '.join(FORMATS)}; write such a file, or a folder of"
                " them or of a saved data set"
            )
        if "media" in paths and not paths["media"].is_dir():
            raise InputError(
                f"{where}: media {str(paths['media'])!r} is no folder; write the one that holds the videos"
            )
        entries[key] = Entry(key, **paths)
    return DataMap(entries, source)


def _path(given: Any, where: str, folder: Path) -> Path:
    if not isinstance(given, str | Path):
        raise InputError(f"{where} is {shown(given)}, not a path; write a line such as {EXAMPLE}")
    path = folder / Path(given).expanduser()
    if not path.exists():
        raise InputError(f"{where}: no file or folder {str(path)!r}; write where the data lie")
    return path.absolute()
