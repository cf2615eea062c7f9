"""Tasks of pictures on disk: a folder with one sub-folder per class, and a file of captions."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vtc.adapters.pairs import Encoder
from vtc.app.images import open_image
from vtc.errors import InputError, one_line
from vtc.eval.encoders.tasks import Classification, Document, Retrieval

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jfif")
)
TEMPLATES = ("a photo of a {}.",)


def class_task(
    folder: Path, encoder: Encoder, classes: Path | None = None, templates: Path | None = None
) -> Classification:
    """Zero-shot classification of the pictures in the sub-folders of `folder`.

    A class is called as its folder, with blanks for underscores, unless `classes` says otherwise: lines "folder = name"
    of folders whose names differ, or one name per folder in their alphabetical order. templates: lines that hold {}.
    Pictures come in turns, one of every class, so that a limit takes some of all.

    Raises:
        InputError: no such folder or file, no classes in it, a class without pictures, a line that cannot be used.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r} of pictures; give one that holds a sub-folder for each class")
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(folders) < 2:
        raise InputError(f"{str(folder)!r} holds {len(folders)} sub-folders; put the pictures of each class into one")
    pictures = [sorted(path for path in each.rglob("*") if path.suffix.lower() in SUFFIXES) for each in folders]
    if empty := [each.name for each, found in zip(folders, pictures, strict=True) if not found]:
        raise InputError(f"{str(folder / empty[0])!r} holds no pictures ({', '.join(sorted(SUFFIXES))}); remove it")
    names = _class_names(classes, [each.name for each in folders])
    turns = [(path, number) for turn in zip_longest(*pictures) for number, path in enumerate(turn) if path is not None]
    documents = [Document(partial(open_image, path), number) for path, number in turns]
    about = [[str(path.relative_to(folder)), path.stat().st_size, number] for path, number in turns]
    return Classification.create(folder.resolve().name, documents, about, encoder, names, _templates(templates))


def _class_names(file: Path | None, folders: Sequence[str]) -> list[str]:
    if file is None:
        return [folder.replace("_", " ") for folder in folders]
    lines = _lines(file)
    if all("=" in line for line in lines):
        given = {folder.strip(): name.strip() for folder, _, name in (line.partition("=") for line in lines)}
        if unknown := [folder for folder in given if folder not in folders]:
            raise InputError(f"{str(file)!r} names the class folder {unknown[0]!r}, which is not there")
        return [given.get(folder, folder.replace("_", " ")) for folder in folders]
    if len(lines) != len(folders):
        raise InputError(
            f"{str(file)!r} holds {len(lines)} names for {len(folders)} class folders; write one for each in their "
            "alphabetical order, or lines such as 'n01440764 = tench'"
        )
    return lines


def _templates(file: Path | None) -> Sequence[str]:
    if file is None:
        return TEMPLATES
    lines = _lines(file)
    if wrong := [line for line in lines if "{}" not in line]:
        raise InputError(f"{str(file)!r}: template {wrong[0]!r} has no {{}} for the class, as in 'a photo of a {{}}.'")
    return lines


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} cannot be read ({one_line(error)}); give a text file") from error
    if not lines:
        raise InputError(f"{str(file)!r} is empty; write one entry per line")
    return lines


def caption_task(file: Path, encoder: Encoder) -> Retrieval:
    """Retrieval among the pictures and captions of a file, see `captions_of`.

    Raises:
        InputError: no such file, or a line that cannot be used.
    """
    found = captions_of(file)
    documents = [Document(partial(open_image, path), captions=tuple(texts)) for path, texts in found.items()]
    about = [[os.path.relpath(path, file.parent), texts] for path, texts in found.items()]
    return Retrieval.create(file.resolve().stem, documents, about, encoder)


def captions_of(file: Path) -> dict[Path, list[str]]:
    """Captions by picture, in the order of a .csv file with columns image and caption, or of a .jsonl file.

    A picture has as many captions as lines, or a list of them under "caption" in JSON. Paths are relative to the file.
    """
    if not file.is_file():
        raise InputError(f"no file {str(file)!r} of captions; give a .csv or .jsonl with image and caption per line")
    found: dict[Path, list[str]] = {}
    for number, line in _captioned(file):
        image, caption = line.get("image"), line.get("caption")
        captions = [caption] if isinstance(caption, str) else caption
        texts = isinstance(captions, list) and all(isinstance(each, str) and each.strip() for each in captions)
        if not isinstance(image, str) or not image.strip() or not captions or not texts:
            raise InputError(
                f"{str(file)!r}, line {number}: expected an image and a caption, such as "
                '{"image": "a.png", "caption": "a cat"}'
            )
        found.setdefault(file.parent / image, []).extend(captions)
    if len(found) < 2:
        raise InputError(f"{str(file)!r} holds {len(found)} pictures; among fewer than two nothing can be sought")
    return found


def _captioned(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 0
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            if file.suffix.lower() == ".csv":
                for number, row in enumerate(csv.DictReader(stream), 2):
                    yield number, row
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    entry = json.loads(line)
                    yield number, entry if isinstance(entry, dict) else {}
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(file)!r}, line {number + 1} cannot be read ({one_line(error)})") from error
