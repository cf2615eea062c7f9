"""The pictures of the documents: what methods keep of embedded scenes and of a photograph.

`python -m vtc.eval.pictures docs/pictures` draws them all.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vtc.app.loading import load
from vtc.app.show import show
from vtc.errors import InputError
from vtc.eval.tiny.benchmark import media, task_rows
from vtc.eval.tiny.tasks import TASKS


@dataclass(frozen=True)
class Drawn:
    """One picture: a model, the document of a task (a photograph where `task` is empty), and what is compared."""

    name: str
    model: str
    methods: tuple[str, ...]
    retentions: tuple[float, ...]
    task: str = ""
    document: int = 0
    scores: bool = False
    side: int = 220


DRAWN = (
    Drawn("scene", "tiny-llava", ("vtc_cls", "fastv", "visionzip", "tome"), (0.4,), "tiny_image", 8),
    Drawn("tiles", "tiny-onevision", ("globalcom2", "hiprune", "random"), (0.25,), "tiny_detail", 4),
    Drawn("video", "tiny-onevision", ("todre", "aim"), (0.3,), "tiny_video", 3, side=90),
    Drawn("photograph", "tiny-onevision", ("hiprune", "visionzip"), (0.25,), scores=True),
)


def draw(picture: Drawn, folder: Path) -> Path:
    """Draw one of them into `folder`; the path of the file."""
    loaded = load(picture.model, device="cpu")
    media, prompt = _photograph() if not picture.task else _document(picture.task, picture.document)
    shown = show(
        loaded.model, loaded.processor, media, prompt, picture.methods, picture.retentions,
        side=picture.side, scores=picture.scores,
    )  # fmt: skip
    return shown.save(folder / f"{picture.name}.webp")


def _document(task: str, number: int) -> tuple[list[Any], str]:
    """Pictures or clip of a task, and one question of each family about them."""
    row = task_rows(TASKS[task], 1)[number]
    return list(media(task, row.seed)), row.question


def _photograph() -> tuple[list[Any], str]:
    """One that scikit-learn ships; the embedded models know drawn scenes only, so their answers mean nothing here."""
    from sklearn.datasets import load_sample_image

    return [Image.fromarray(load_sample_image("china.jpg"))], "is there a red star?"


def main(arguments: Sequence[str]) -> None:
    """Draw all of them into the folder named on the command line."""
    if len(arguments) != 1:
        raise InputError(f"{len(arguments)} arguments given; name the folder to write to, such as docs/pictures")
    for picture in DRAWN:
        print(draw(picture, Path(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
