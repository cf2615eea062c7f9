"""tiny_list: scenes of many things and questions whose answer is a list of 8 to 20 words."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from vtc.eval.tiny import drawing, questions
from vtc.eval.tiny.canvas import COLOURS, SHAPES, Box, Canvas, Item
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.sample import Facts, Sample, Task, about_picture
from vtc.eval.tiny.scenes import SIZE, SPLITS

STREAM = 3  # third number of the seed
_APART = 6.0  # px between the centres of neighbours in the order that is asked for
MIN_OBJECTS, MIN_TEXTS = 3, 5  # fewer make answers of fewer than 8 words


def _apart(canvas: Canvas, axis: int) -> Callable[[Box], bool]:
    """Accepts places whose centre is not level with that of a thing that `canvas` already holds, from now on."""
    before = len(canvas.boxes)

    def accept(box: Box) -> bool:
        middle = (box[axis] + box[axis + 2]) / 2
        return all(abs(middle - (b[axis] + b[axis + 2]) / 2) >= _APART for b in canvas.boxes[before:])

    return accept


def make(seed: int, split: str) -> Sample:
    """Scene number `seed` of a split: shapes apart from each other in x; words apart in y, or digits apart in x."""
    rng = np.random.default_rng([seed, SPLITS[split], STREAM])
    canvas = Canvas.blank(rng, SIZE, SIZE)
    drawing.clutter(rng, canvas.image, int(rng.integers(0, 8)))
    texts, with_words = int(rng.integers(MIN_TEXTS, 7)), rng.random() < 0.5
    canvas.accept = _apart(canvas, 1 if with_words else 0)
    for _ in range(texts):
        if with_words:
            canvas.add_word((1.3, 1.9))
        else:
            canvas.add_digit((19, 27), split == "train")
    canvas.accept = _apart(canvas, 0)
    for _ in range(int(rng.integers(MIN_OBJECTS, 7))):
        canvas.add_shape((8.5, 14), SHAPES, COLOURS)
    return Sample(canvas.finish()[None], Facts((tuple(canvas.items),), (SIZE, SIZE)))


def _answer(items: list[Item], axis: int, backwards: bool) -> str:
    ordered = sorted(items, key=lambda item: item.centre[axis], reverse=backwards)
    return ", ".join(f"{item.colour} {item.name}".strip() for item in ordered)


def objects(facts: Facts, rng: random.Random) -> Question | None:
    """All shapes with their colours, from left to right or from right to left."""
    found = [item for item in facts.pictures[0] if item.kind == "shape"]
    if len(found) < MIN_OBJECTS:
        return None
    backwards = rng.random() < 0.5
    way = "right to left" if backwards else "left to right"
    return Question(f"List every object from {way}.", _answer(found, 0, backwards))


def _reading(kind: str, axis: int, ways: tuple[str, str]) -> Callable[[Facts, random.Random], Question | None]:
    def ask(facts: Facts, rng: random.Random) -> Question | None:
        found = [item for item in facts.pictures[0] if item.kind == kind]
        if len(found) < MIN_TEXTS:
            return None
        backwards = rng.random() < 0.5
        return Question(f"Read all {kind}s from {ways[backwards]}.", _answer(found, axis, backwards))

    return ask


words = _reading("word", 1, ("top to bottom", "bottom to top"))
digits = _reading("digit", 0, ("left to right", "right to left"))

TASK = Task(
    name="tiny_list",
    media="image",
    geometries=1,
    make=make,
    families={
        "objects": objects,
        "words": words,
        "digits": digits,
        "existence": about_picture(questions.existence),
        "counting": about_picture(questions.counting),
        "relation": about_picture(questions.relation),
        "location": about_picture(questions.location),
    },
    answers={name: questions.ANSWERS[name] for name in ("existence", "counting", "relation", "location")},
    slots=(
        *(("objects", 26), ("objects", 26), ("words", 20), ("digits", 20), ("words", 20)),
        *(("existence", 8), ("counting", 9), ("relation", 13), ("location", 8)),
    ),
    fallbacks=("digits", "existence"),
    fillers=("existence", "counting", "relation", "location"),
)
