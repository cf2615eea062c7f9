"""A task's fingerprint: answers are comparable only if the questions and the code that scores them are the same."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vtc.method.checkpoint import content_digest


def task_fingerprint(config: Mapping[str, Any], documents: Any, profile: str, local: Sequence[Path] = ()) -> str:
    """16 hexadecimal digits of a task's settings, the source files of its functions, its data and its prompt profile.

    Local data files count by content, so that a folder may move; data sets from the hub by their revision. `local` are
    files in place of the task's data sets.
    """
    settings = dict(config)
    kwargs = dict(settings.pop("dataset_kwargs") or {})
    files = [*local, *_paths(kwargs.pop("data_files", None))]
    data = [content_digest(file) for file in files] or _cached_data(documents)
    content = {"settings": settings, "dataset_kwargs": kwargs, "data": data, "n": len(documents), "profile": profile}
    canonical = json.dumps(content, sort_keys=True, default=_stable)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _paths(data_files: Any) -> Iterator[Path]:
    """Local files in the `data_files` of a task: a name, a list or a mapping of splits."""
    if isinstance(data_files, str):
        if Path(data_files).is_file():
            yield Path(data_files)
    elif isinstance(data_files, Mapping):
        for split in sorted(data_files):
            yield from _paths(data_files[split])
    elif isinstance(data_files, Sequence):
        for entry in data_files:
            yield from _paths(entry)


def _cached_data(documents: Any) -> list[str]:
    """Folder names, which hold a hub data set's revision, and sizes of the files that a data set lies in."""
    files = [Path(file["filename"]) for file in getattr(documents, "cache_files", ())]
    return sorted(f"{file.parent.name}:{file.stat().st_size}" for file in files)


def _stable(value: Any) -> str:
    """A function by the content of the file it is defined in; any other object by its type and attributes."""
    while isinstance(value, partial):
        value = value.func
    if callable(value):
        source = inspect.getsourcefile(value) if inspect.isfunction(value) or inspect.ismethod(value) else None
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"{name}:{content_digest(Path(source)) if source else ''}"
    return (
        f"{type(value).__qualname__}:{json.dumps(getattr(value, '__dict__', str(value)), default=str, sort_keys=True)}"
    )
