"""Question families of tiny_video. All but `colour`, `words` and `digits` need more than one frame."""

from __future__ import annotations

import random
from collections.abc import Callable

from vtc.eval.tiny import clips
from vtc.eval.tiny.canvas import COLOURS, SHAPES
from vtc.eval.tiny.glyphs import WORDS
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.sample import Actor, Facts, Task
from vtc.eval.tiny.vocabulary import NUMBERS

TEMPORAL = (
    "direction",
    "order",
    "onset",
    "repeats",
    "while",
)  # near chance for a model that sees the middle frame only

CELL, LAST_CELL = 14, 5  # px of a column or a row, and the number of the last one
_WHILE_WEIGHTS = {"yes": 1.0, "no": 3.0}  # where a clip offers both, as guests are rarely away all the time


def _name(actor: Actor) -> str:
    return f"{actor.colour} {actor.name}"


def _movers(facts: Facts) -> list[Actor]:
    return [actor for actor in facts.actors if actor.direction]


def _guests(facts: Facts) -> list[Actor]:
    return [actor for actor in facts.actors if not actor.direction]


def direction(facts: Facts, rng: random.Random) -> Question | None:
    """Left, right, up or down; it follows from where the mover begins and ends."""
    mover = rng.choice(_movers(facts))
    clues = clips.bins([*mover.path[0], *mover.path[-1]])
    return Question(f"Which way does the {_name(mover)} move?", mover.direction, clues)


def order(facts: Facts, rng: random.Random) -> Question | None:
    """Whether one of two guests that appear once comes before the other."""
    once = [actor for actor in _guests(facts) if len(actor.starts) == 1]
    if len(once) < 2:
        return None
    a, b = rng.sample(once, 2)
    return Question(f"Does the {_name(a)} appear before the {_name(b)}?", "yes" if a.starts[0] < b.starts[0] else "no")


def onset(facts: Facts, rng: random.Random) -> Question | None:
    """Form or colour of what appears first or last; a guest that comes back appears again."""
    starts = sorted((start, index) for index, actor in enumerate(_guests(facts)) for start in actor.starts)
    if len({index for _, index in starts}) < 2:
        return None
    last = rng.random() < 0.5
    guest = _guests(facts)[starts[-1 if last else 0][1]]
    when = "last" if last else "first"
    if rng.random() < 0.5:
        return Question(f"What shape appears {when}?", guest.name)
    return Question(f"What color appears {when}?", guest.colour)


def repeats(facts: Facts, rng: random.Random) -> Question | None:
    """How often the first guest, which alone may come back, appears: one to three times, equally often."""
    guests = _guests(facts)
    if not guests:
        return None
    return Question(f"How many times does the {_name(guests[0])} appear?", NUMBERS[len(guests[0].starts)])


def meanwhile(facts: Facts, rng: random.Random) -> Question | None:
    """Whether a mover travels while a guest is shown: all that time, or at no moment of it.

    It follows from the first and the last frame of both.
    """
    cases: dict[str, list[tuple[Actor, Actor]]] = {"yes": [], "no": []}
    for mover in _movers(facts):
        start, end = mover.moves
        for guest in _guests(facts):
            frames = [t for t, here in enumerate(guest.shown) if here]
            if len(guest.starts) == 1 and start <= frames[0] and frames[-1] <= end:
                cases["yes"].append((mover, guest))
            elif all(t < start or t > end for t in frames):
                cases["no"].append((mover, guest))
    answers = [answer for answer in ("yes", "no") if cases[answer]]
    if not answers:
        return None
    answer = rng.choices(answers, [_WHILE_WEIGHTS[answer] for answer in answers])[0]
    mover, guest = rng.choice(cases[answer])
    clues = (*mover.moves, guest.shown.index(True), len(guest.shown) - 1 - guest.shown[::-1].index(True))
    return Question(f"Does the {_name(mover)} move while the {_name(guest)} is shown?", answer, clues)


def colour(facts: Facts, rng: random.Random) -> Question | None:
    """The colour of an actor that its form names."""
    actor = rng.choice(facts.actors)
    return Question(f"What color is the {actor.name}?", actor.colour)


def track(facts: Facts, rng: random.Random) -> Question | None:
    """The column or the row in which a mover is, in every second frame: what its direction comes from."""
    mover, axis = rng.choice(_movers(facts)), rng.randrange(2)
    places = (min(int(place[axis] / CELL), LAST_CELL) for place in mover.path[::2])
    way = ("left to right", "top to bottom")[axis]
    return Question(f"Where is the {_name(mover)} in every frame from {way}?", " ".join(NUMBERS[n] for n in places))


def moving(facts: Facts, rng: random.Random) -> Question | None:
    """Whether a mover travels, in every second frame."""
    mover = rng.choice(_movers(facts))
    start, end = mover.moves
    return Question(
        f"Does the {_name(mover)} move in every frame?",
        " ".join("yes" if start <= t < end else "no" for t in range(0, len(mover.path), 2)),
    )


def present(facts: Facts, rng: random.Random) -> Question | None:
    """Whether a guest is shown in a frame or the next one, in every second frame."""
    guests = _guests(facts)
    if not guests:
        return None
    guest = rng.choice(guests)
    pairs = zip(guest.shown[::2], guest.shown[1::2], strict=True)
    return Question(f"Is the {_name(guest)} shown in every frame?", " ".join("yes" if any(p) else "no" for p in pairs))


def _reading(kind: str, text: str) -> Callable[[Facts, random.Random], Question | None]:
    def ask(facts: Facts, rng: random.Random) -> Question | None:
        return next((Question(text, i.name) for items in facts.pictures for i in items if i.kind == kind), None)

    return ask


TASK = Task(
    name="tiny_video",
    media="video",
    geometries=len(clips.FRAMES),
    make=clips.make,
    families={
        "direction": direction,
        "order": order,
        "onset": onset,
        "repeats": repeats,
        "while": meanwhile,
        "colour": colour,
        "words": _reading("word", "What word is written?"),
        "digits": _reading("digit", "What digit is shown?"),
        "track": track,
        "moving": moving,
        "present": present,
    },
    answers={
        "direction": tuple(clips.STEPS),
        "order": ("yes", "no"),
        "onset": SHAPES + COLOURS,
        "repeats": NUMBERS[1 : clips.MAX_TIMES + 1],
        "while": ("yes", "no"),
        "colour": COLOURS,
        "words": WORDS,
        "digits": tuple(str(digit) for digit in range(10)),
    },
    slots=(
        *(("direction", 10), ("direction", 10), ("order", 12), ("order", 12), ("while", 14), ("while", 14)),
        *(("onset", 7), ("onset", 7), ("onset", 7), ("onset", 7), ("repeats", 11)),
        *(("colour", 8), ("words", 7), ("digits", 7)),
        *(("track", 22), ("track", 22), ("moving", 18), ("present", 18)),
    ),
    fallbacks=("colour", "onset"),
    fillers=("track", "moving", "present"),
)
