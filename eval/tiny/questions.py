"""Questions about scenes in nine families, each with an answer of one word.

A family is a function from the items of a scene and a random generator to a `Question`, or to None where the scene
offers no unambiguous question of that family.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtc.eval.tiny.canvas import COLOURS, SHAPES, Item
from vtc.eval.tiny.glyphs import WORDS
from vtc.eval.tiny.scenes import border_distance, quadrant
from vtc.eval.tiny.vocabulary import LOCATIONS, NUMBERS, PLURALS

MAX_COUNT = 4
_COUNT_WEIGHTS = (1.0, 1.0, 1.3, 2.0, 3.0)  # large counts are rare in scenes
_RELATION_MARGIN = 1.4  # the larger of the two offsets must exceed the smaller one by this factor
_BORDER_MARGIN = 6.0  # px to the lines between the quarters


@dataclass(frozen=True)
class Question:
    """A question in plain English and its answer, one word of the vocabulary.

    clues: four numbers that the answer follows from, for which training may ask too (`vtc.eval.tiny.places`).
    """

    text: str
    answer: str
    clues: tuple[int, ...] = ()


Family = Callable[[Sequence[Item], random.Random], Question | None]


def _shapes(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.kind == "shape"]


def _unique(items: Sequence[Item]) -> list[Item]:
    """Shapes that their colour and form name unambiguously."""
    count = Counter((item.colour, item.name) for item in items)
    return [item for item in items if count[item.colour, item.name] == 1]


def _phrase(item: Item) -> str:
    return f"{item.colour} {item.name}"


def existence(items: Sequence[Item], rng: random.Random) -> Question | None:
    """Yes or no, half each; most negatives name a colour or a shape that is there in another combination."""
    present = sorted({(item.colour, item.name) for item in _shapes(items)})
    answer = "yes" if present and rng.random() < 0.5 else "no"
    colour, name = rng.choice(present) if answer == "yes" else _absent(present, rng)
    article = "an" if colour[0] in "aeiou" else "a"
    return Question(f"Is there {article} {colour} {name}?", answer)


def _absent(present: Sequence[tuple[str, str]], rng: random.Random) -> tuple[str, str]:
    """A colour and a shape that do not occur together: 3 of 10 share the shape, 3 the colour, 3 both, 1 neither."""
    draw = rng.random()
    names = sorted({name for _, name in present}) if present and 0.1 < draw < 0.7 else list(SHAPES)
    colours = sorted({colour for colour, _ in present}) if present and draw > 0.4 else list(COLOURS)
    free = [(colour, name) for colour in colours for name in names if (colour, name) not in present]
    return rng.choice(free or [(c, n) for c in COLOURS for n in SHAPES if (c, n) not in present])


def colour(items: Sequence[Item], rng: random.Random) -> Question | None:
    """The colour of the only shape of its form."""
    shapes = _shapes(items)
    count = Counter(item.name for item in shapes)
    candidates = [item for item in shapes if count[item.name] == 1]
    if not candidates:
        return None
    item = rng.choice(candidates)
    return Question(f"What color is the {item.name}?", item.colour)


def shape(items: Sequence[Item], rng: random.Random) -> Question | None:
    """The form of the only shape of its colour."""
    shapes = _shapes(items)
    count = Counter(item.colour for item in shapes)
    candidates = [item for item in shapes if count[item.colour] == 1]
    if not candidates:
        return None
    item = rng.choice(candidates)
    return Question(f"What shape is the {item.colour} object?", item.name)


def counting(items: Sequence[Item], rng: random.Random) -> Question | None:
    """Zero to four shapes of one form or colour, large numbers drawn more often than they occur."""
    shapes = _shapes(items)
    by_number: dict[int, list[str]] = {}
    for name in SHAPES:
        number = sum(item.name == name for item in shapes)
        by_number.setdefault(number, []).append(f"How many {PLURALS[name]} are there?")
    for paint in COLOURS:
        number = sum(item.colour == paint for item in shapes)
        by_number.setdefault(number, []).append(f"How many {paint} objects are there?")
    numbers = [number for number in sorted(by_number) if number <= MAX_COUNT]
    number = rng.choices(numbers, [_COUNT_WEIGHTS[n] for n in numbers])[0]
    return Question(rng.choice(by_number[number]), NUMBERS[number])


def relation(items: Sequence[Item], rng: random.Random) -> Question | None:
    """Left, right, above or below: the clearly larger offset between the centres of two shapes."""
    unique = _unique(_shapes(items))
    pairs = [(a, b, side) for a in unique for b in unique if a is not b and (side := _side(a, b))]
    if not pairs:
        return None
    a, b, side = rng.choice(pairs)
    return Question(f"Where is the {_phrase(a)} relative to the {_phrase(b)}?", side)


def _side(a: Item, b: Item) -> str:
    """Where a lies as seen from b, or "" if neither direction dominates."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if max(abs(dx), abs(dy)) <= _RELATION_MARGIN * min(abs(dx), abs(dy)):
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def referring(items: Sequence[Item], rng: random.Random) -> Question | None:
    """Form or colour of the only shape in a quarter of the picture; None if any shape is close to a quarter line."""
    shapes = _shapes(items)
    if any(border_distance(item) <= _BORDER_MARGIN for item in shapes):
        return None
    count = Counter(quadrant(item) for item in shapes)
    candidates = [item for item in shapes if count[quadrant(item)] == 1]
    if not candidates:
        return None
    item = rng.choice(candidates)
    place = quadrant(item).replace("-", " ")
    if rng.random() < 0.5:
        return Question(f"What shape is in the {place}?", item.name)
    return Question(f"What color is in the {place}?", item.colour)


def location(items: Sequence[Item], rng: random.Random) -> Question | None:
    """The quarter of the picture that holds an unambiguous shape."""
    candidates = [item for item in _unique(_shapes(items)) if border_distance(item) > _BORDER_MARGIN]
    if not candidates:
        return None
    item = rng.choice(candidates)
    return Question(f"Where is the {_phrase(item)}?", quadrant(item))


def _read(items: Sequence[Item], kind: str, text: str) -> Question | None:
    return next((Question(text, item.name) for item in items if item.kind == kind), None)


def digits(items: Sequence[Item], rng: random.Random) -> Question | None:
    """The handwritten digit."""
    return _read(items, "digit", "What digit is shown?")


def words(items: Sequence[Item], rng: random.Random) -> Question | None:
    """The written word."""
    return _read(items, "word", "What word is written?")


FAMILIES: dict[str, Family] = {
    "existence": existence,
    "colour": colour,
    "shape": shape,
    "counting": counting,
    "relation": relation,
    "referring": referring,
    "location": location,
    "digits": digits,
    "words": words,
}
ANSWERS: dict[str, tuple[str, ...]] = {
    "existence": ("yes", "no"),
    "colour": COLOURS,
    "shape": SHAPES,
    "counting": NUMBERS[: MAX_COUNT + 1],
    "relation": ("left", "right", "above", "below"),
    "referring": SHAPES + COLOURS,
    "location": LOCATIONS,
    "digits": tuple(str(digit) for digit in range(10)),
    "words": WORDS,
}
