"""Rows of a data set from local files: Parquet, JSON, JSON lines, CSV, or a folder that `datasets` saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtc.errors import InputError, one_line

FORMATS: Mapping[str, str] = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
"""Suffix -> the builder of `datasets` that reads it."""
SAVED = ("dataset_dict.json", "state.json")
ABOUT = ("dataset_info.json", "dataset_infos.json")  # what lies beside the rows
PICTURE = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)


def data_files(path: Path, configuration: str | None, split: str | None) -> list[Path]:
    """The files under `path` that hold the rows of a configuration and split; `path` itself if it is a file.

    In a folder those in the sub-folder, or of the name, of the configuration come first, and of these the ones whose
    name begins with the split's.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in FORMATS and file.name not in ABOUT)
    if configuration:
        here = [f for f in found if f.stem == configuration or configuration in f.relative_to(path).parts[:-1]]
        found = here or found
    if split:
        found = [f for f in found if re.match(rf"{re.escape(split)}\b|{re.escape(split)}_", f.stem)] or found
    if not found:
        raise InputError(f"folder {str(path)!r} holds none of {', '.join(FORMATS)}; write the folder that does")
    if len({file.suffix for file in found}) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise InputError(f"folder {str(path)!r} holds files of several kinds ({names}, ...); write one of them")
    return found


def saved(path: Path) -> bool:
    """Whether `datasets` saved the folder with `save_to_disk`."""
    return any((path / name).is_file() for name in SAVED)


def load_rows(path: Path, configuration: str | None, split: str | None, media: Path | None) -> tuple[Any, list[Path]]:
    """A `datasets.Dataset`, and the files that hold it.

    Columns with pictures become pictures: bytes, as data sets on the hub have them, and names of files below `media`
    or beside the data.

    Raises:
        InputError: files that cannot be read or are empty, or a saved folder without the split.
    """
    import datasets

    try:
        if path.is_dir() and saved(path):
            rows = datasets.load_from_disk(str(path))
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise InputError(f"{str(path)!r} has the splits {', '.join(rows)}, not {split!r}; save that one")
                rows = rows[split]
            files = sorted(file for file in path.rglob("*") if file.is_file())
        else:
            files = data_files(path, configuration, split)
            kind, names = FORMATS[files[0].suffix], [str(file) for file in files]
            rows = datasets.load_dataset(kind, data_files={"train": names}, split="train")
    except InputError:
        raise
    except Exception as error:
        if isinstance(error.__cause__ or error, StopIteration):  # `datasets` met the end before a first row
            raise _empty(path) from error
        reason = one_line(error.__cause__ or error)
        raise InputError(f"{str(path)!r} cannot be read: {reason}; write a file that `datasets` can load") from error
    if not len(rows):
        raise _empty(path)
    folders = [folder for folder in (media, path if path.is_dir() else path.parent) if folder is not None]
    return _with_pictures(rows, folders), files


def _empty(path: Path) -> InputError:
    return InputError(f"{str(path)!r} holds no rows; write a file with a row for each question or picture")


def _with_pictures(rows: Any, folders: Sequence[Path]) -> Any:
    import datasets

    picture = datasets.Image()
    for name, feature in rows.features.items():
        inner = getattr(feature, "feature", None)
        if _bytes(feature):
            rows = rows.cast_column(name, picture)
        elif inner is not None and _bytes(inner):
            rows = rows.cast_column(name, datasets.List(picture))
        elif len(rows) and (folder := _folder_of(rows[0][name], folders)) is not None:
            rows = rows.map(_absolute, fn_kwargs={"name": name, "folder": str(folder)})
            rows = rows.cast_column(name, picture if isinstance(rows[0][name], str) else datasets.List(picture))
    return rows


def _bytes(feature: Any) -> bool:
    """Whether it is how Parquet files hold a picture that do not say that it is one."""
    return isinstance(feature, Mapping) and set(feature) == {"bytes", "path"}


def _names(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _folder_of(value: Any, folders: Sequence[Path]) -> Path | None:
    """The folder below which all names of a value are files with pictures."""
    names = list(_names(value))
    if not names or not all(isinstance(name, str) and PICTURE.search(name) for name in names):
        return None
    return next((folder for folder in folders if all((folder / name).is_file() for name in names)), None)


def _absolute(row: Mapping[str, Any], name: str, folder: str) -> dict[str, Any]:
    value = row[name]
    paths = [str(Path(folder) / entry) for entry in _names(value)]
    return {name: paths if isinstance(value, list) else paths[0]}
