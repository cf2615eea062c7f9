"""tiny_multi: two to four pictures in one prompt, and questions that need the right one or all of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from vtc.eval.tiny import drawing
from vtc.eval.tiny.canvas import COLOURS, SHAPES, Canvas, Item, subset
from vtc.eval.tiny.glyphs import WORDS
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.sample import Facts, Sample, Task
from vtc.eval.tiny.scenes import SPLITS
from vtc.eval.tiny.vocabulary import NUMBERS

STREAM = 4  # third number of the seed
SIZE = 84  # pixels
COUNTS = (2, 3, 4)  # pictures
ORDINALS = ("first", "second", "third", "fourth")


def make(seed: int, split: str) -> Sample:
    """Pictures number `seed` of a split; shapes and colours come from the same subset in all of them."""
    rng = np.random.default_rng([seed, SPLITS[split], STREAM])
    shapes, colours = subset(rng, SHAPES), subset(rng, COLOURS)
    pictures, items = [], []
    for _ in range(COUNTS[seed % len(COUNTS)]):
        canvas = Canvas.blank(rng, SIZE, SIZE)
        drawing.clutter(rng, canvas.image, int(rng.integers(1, 5)))
        if rng.random() < 0.5:
            canvas.add_word((1.9, 2.3))
        if rng.random() < 0.5:
            canvas.add_digit((24, 31), split == "train")
        for _ in range(int(rng.integers(1, 5))):
            canvas.add_shape((8, 13), shapes, colours)
        pictures.append(canvas.finish())
        items.append(tuple(canvas.items))
    return Sample(np.stack(pictures), Facts(tuple(items), (SIZE, SIZE)))


def _shapes(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.kind == "shape"]


def which(facts: Facts, rng: random.Random) -> Question | None:
    """The only picture that holds a shape of a colour, or a word."""
    sets = [
        {f"{i.colour} {i.name}" if i.kind == "shape" else f"word {i.name}" for i in items if i.kind != "digit"}
        for items in facts.pictures
    ]
    count = Counter(name for names in sets for name in names)
    known = [(name, index) for index, names in enumerate(sets) for name in sorted(names) if count[name] == 1]
    if not known:
        return None
    name, index = rng.choice(known)
    return Question(f"Which picture holds the {name}?", ORDINALS[index])


def most(facts: Facts, rng: random.Random) -> Question | None:
    """The picture that holds more shapes than any other."""
    numbers = [len(_shapes(items)) for items in facts.pictures]
    best = max(numbers)
    if numbers.count(best) > 1:
        return None
    return Question("Which picture holds the most objects?", ORDINALS[numbers.index(best)])


def total(facts: Facts, rng: random.Random) -> Question | None:
    """The number of pictures that hold a shape of a form, zero to four; the number is drawn first."""
    by_number: dict[int, list[str]] = {}
    for name in SHAPES:
        number = sum(any(item.name == name for item in _shapes(items)) for items in facts.pictures)
        by_number.setdefault(number, []).append(name)
    number = rng.choice(sorted(by_number))
    return Question(f"How many pictures hold a {rng.choice(by_number[number])}?", NUMBERS[number])


def _looking(key: str) -> Callable[[Facts, random.Random], Question | None]:
    def ask(facts: Facts, rng: random.Random) -> Question | None:
        index = rng.randrange(len(facts.pictures))
        shapes = _shapes(facts.pictures[index])
        count = Counter(getattr(item, key) for item in shapes)
        known = [item for item in shapes if count[getattr(item, key)] == 1]
        if not known:
            return None
        item = rng.choice(known)
        place = f"in the {ORDINALS[index]} picture?"
        if key == "name":
            return Question(f"What color is the {item.name} {place}", item.colour)
        return Question(f"What shape is the {item.colour} object {place}", item.name)

    return ask


def _reading(kind: str) -> Callable[[Facts, random.Random], Question | None]:
    def ask(facts: Facts, rng: random.Random) -> Question | None:
        known = [(item, index) for index, items in enumerate(facts.pictures) for item in items if item.kind == kind]
        if not known:
            return None
        item, index = rng.choice(known)
        return Question(f"What {kind} is in the {ORDINALS[index]} picture?", item.name)

    return ask


TASK = Task(
    name="tiny_multi",
    media="images",
    geometries=len(COUNTS),
    make=make,
    families={
        "which": which,
        "most": most,
        "total": total,
        "colour": _looking("name"),
        "shape": _looking("colour"),
        "words": _reading("word"),
        "digits": _reading("digit"),
    },
    answers={
        "which": ORDINALS,
        "most": ORDINALS,
        "total": NUMBERS[:5],
        "colour": COLOURS,
        "shape": SHAPES,
        "words": WORDS,
        "digits": tuple(str(digit) for digit in range(10)),
    },
    slots=(
        *(("which", 9), ("which", 9), ("which", 9), ("most", 9), ("total", 9), ("total", 9)),
        *(("colour", 12), ("colour", 12), ("shape", 13), ("words", 10), ("words", 10), ("digits", 10), ("digits", 10)),
    ),
    fallbacks=("which", "colour", "total"),
)
