"""tiny_detail: wide, tall and square scenes with large things for the overview and small ones that need the crops.

Seen through an overview of 84 pixels, small shapes are about 5 pixels wide, words 10 to 14 and digits 6 to 7.
"""

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
from vtc.eval.tiny.vocabulary import LOCATIONS, NUMBERS

STREAM = 1  # third number of the seed: every task has its own random stream
SIZES = ((168, 168), (168, 140), (140, 168), (84, 252), (252, 84))  # height, width: multiples of the 14 px of a patch
SMALL, LARGE = (4.5, 6.5), (14.0, 22.0)  # px radius
_LIMIT = 9.0  # px radius between small and large
_MARGIN = 5.0  # px to the lines between the quarters
CROP_FAMILIES = ("words", "digits", "small_shapes")  # need the crops; the others can be told from the overview


def make(seed: int, split: str) -> Sample:
    """Scene number `seed` of a split."""
    rng = np.random.default_rng([seed, SPLITS[split], STREAM])
    height, width = SIZES[seed % len(SIZES)]
    canvas = Canvas.blank(rng, height, width)
    drawing.clutter(rng, canvas.image, int(rng.integers(2, 10)))
    shapes, colours = subset(rng, SHAPES), subset(rng, COLOURS)
    for _ in range(int(rng.integers(1, 5))):
        canvas.add_shape(LARGE, shapes, colours)
    for _ in range(int(rng.integers(1, 3))):
        canvas.add_word((1.0, 1.4))
    for _ in range(int(rng.integers(1, 3))):
        canvas.add_digit((12, 16), split == "train")
    for _ in range(int(rng.integers(2, 6))):
        canvas.add_shape(SMALL, SHAPES, COLOURS)
    return Sample(canvas.finish()[None], Facts((tuple(canvas.items),), (height, width)))


def quadrant(item: Item, size: tuple[int, int]) -> str:
    """Quarter of the centre of an item, e.g. "top-left", or "" if the centre is close to a line between quarters."""
    (x, y), (height, width) = item.centre, size
    if min(abs(x - width / 2), abs(y - height / 2)) <= _MARGIN:
        return ""
    return f"{'bottom' if y > height / 2 else 'top'}-{'right' if x > width / 2 else 'left'}"


def _shapes(facts: Facts, large: bool) -> list[Item]:
    return [i for i in facts.pictures[0] if i.kind == "shape" and (i.width / 2 > _LIMIT) == large]


def _reading(kind: str) -> Callable[[Facts, random.Random], Question | None]:
    def ask(facts: Facts, rng: random.Random) -> Question | None:
        found = [item for item in facts.pictures[0] if item.kind == kind]
        if len(found) == 1 and rng.random() < 0.5:
            return Question(f"What {kind} is {'written' if kind == 'word' else 'shown'}?", found[0].name)
        places = [quadrant(item, facts.size) for item in found]
        known = [(item, place) for item, place in zip(found, places, strict=True) if place]
        if "" in places or not known:
            return None
        item, place = rng.choice(known)
        if places.count(place) > 1:
            return None
        return Question(f"What {kind} is in the {place.replace('-', ' ')}?", item.name)

    return ask


def _unique(items: Sequence[Item], key: Callable[[Item], object]) -> list[Item]:
    count = Counter(key(item) for item in items)
    return [item for item in items if count[key(item)] == 1]


def _form(large: bool) -> Callable[[Facts, random.Random], Question | None]:
    def ask(facts: Facts, rng: random.Random) -> Question | None:
        known = _unique(_shapes(facts, large), lambda item: item.colour)
        if not known:
            return None
        item = rng.choice(known)
        return Question(f"What shape is the {'large' if large else 'small'} {item.colour} object?", item.name)

    return ask


def large_count(facts: Facts, rng: random.Random) -> Question | None:
    """The number of large shapes, one to four."""
    number = len(_shapes(facts, True))
    return Question("How many large objects are there?", NUMBERS[number]) if 1 <= number <= 4 else None


def large_place(facts: Facts, rng: random.Random) -> Question | None:
    """The quarter that holds an unambiguous large shape."""
    known = [
        (item, place)
        for item in _unique(_shapes(facts, True), lambda item: (item.colour, item.name))
        if (place := quadrant(item, facts.size))
    ]
    if not known:
        return None
    item, place = rng.choice(known)
    return Question(f"Where is the large {item.colour} {item.name}?", place)


TASK = Task(
    name="tiny_detail",
    media="image",
    geometries=len(SIZES),
    make=make,
    families={
        "words": _reading("word"),
        "digits": _reading("digit"),
        "small_shapes": _form(False),
        "large_shapes": _form(True),
        "large_count": large_count,
        "large_place": large_place,
    },
    answers={
        "words": WORDS,
        "digits": tuple(str(digit) for digit in range(10)),
        "small_shapes": SHAPES,
        "large_shapes": SHAPES,
        "large_count": NUMBERS[1:5],
        "large_place": LOCATIONS,
    },
    slots=(
        *(("words", 10), ("words", 10), ("digits", 10), ("digits", 10)),
        *(("small_shapes", 10), ("small_shapes", 10), ("small_shapes", 10)),
        *(("large_shapes", 10), ("large_count", 9), ("large_place", 9)),
    ),
    fallbacks=("small_shapes", "large_shapes", "large_place"),
)
