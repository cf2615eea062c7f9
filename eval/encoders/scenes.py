"""Tasks of embedded scenes that no training has seen, for an encoder that knows their words."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from PIL import Image

from vtc.adapters.pairs import Encoder
from vtc.eval.encoders.tasks import Classification, Document, PictureTask, Retrieval
from vtc.eval.tiny.canvas import COLOURS, SHAPES, Item
from vtc.eval.tiny.captions import complete, placed
from vtc.eval.tiny.glyphs import WORDS
from vtc.eval.tiny.scenes import Scene, make_scene

SPLIT = "benchmark"
SCENES = 600
TEMPLATES = ("a picture with {}", "the picture holds {}", "there is {}")


def scene_tasks(encoder: Encoder, count: int = SCENES) -> list[PictureTask]:
    """Colour, form, digit and word, each of the scenes among the first `count` that show one alone, and retrieval."""
    scenes = [make_scene(number, SPLIT) for number in range(count)]
    tasks: list[PictureTask] = []
    for name, kind, classes, said in _CLASSES:
        documents = [
            Document(_opener(scene), classes.index(found.pop()))
            for scene in scenes
            if len(found := set(_names(scene.items, kind))) == 1
        ]
        if documents:
            about = [SPLIT, kind]
            texts = [said.replace("{}", each) for each in classes]
            tasks.append(Classification.create(f"scenes_{name}", documents, about, encoder, texts, TEMPLATES))
    captioned = [Document(_opener(scene), captions=_captions(number, scene)) for number, scene in enumerate(scenes)]
    tasks.append(Retrieval.create("scenes_retrieval", captioned, [SPLIT, "captions"], encoder))
    return tasks


_CLASSES = (
    ("colour", "colour", COLOURS, "a {} object"),
    ("form", "form", SHAPES, "a {}"),
    ("digit", "digit", tuple(str(digit) for digit in range(10)), "the digit {}"),
    ("word", "word", WORDS, "the word {}"),
)
"""Task, what its classes are of, the classes and how they are said."""


def _names(items: Sequence[Item], kind: str) -> Iterator[str]:
    """The names of one kind that a scene shows."""
    for item in items:
        if item.kind == kind:
            yield item.name
        elif item.kind == "shape" and kind in ("colour", "form"):
            yield item.colour if kind == "colour" else item.name


def _captions(number: int, scene: Scene) -> tuple[str, ...]:
    """One that names everything, one that says of up to three things where they are."""
    rng = random.Random(number)
    return complete(scene.items, rng).text, placed(scene.items, rng).text


class _opener:
    """Opens the picture of a scene that is in memory."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def __call__(self) -> Image.Image:
        return Image.fromarray(self._scene.image)
