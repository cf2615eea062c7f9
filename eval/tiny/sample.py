"""What a task shows, what is true about it, and how its questions are drawn and packed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.packing import IGNORED, Packed, tokens
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.vocabulary import ASSISTANT, END, PAD, TOKEN

Media = Literal["image", "images", "video"]
_TRIES = 3  # draws of a family until a question comes up that the pack does not hold yet


@dataclass(frozen=True)
class Actor:
    """A shape of a clip: in which frames it is shown, and its centre in every frame, shown or not.

    `direction` is "" for one that never moves; else it moves from frame `moves[0]` to frame `moves[1]` and leaves the
    frame on one side to come back on the other.
    """

    name: str
    colour: str
    radius: float
    shown: tuple[bool, ...]
    path: tuple[tuple[float, float], ...]
    direction: str = ""
    moves: tuple[int, int] = (0, 0)

    @property
    def starts(self) -> tuple[int, ...]:
        """Frames in which it appears after it was away."""
        return tuple(t for t, here in enumerate(self.shown) if here and not (t and self.shown[t - 1]))


@dataclass(frozen=True)
class Facts:
    """The things of every picture or frame, the size of the pictures (height, width), and the actors of a clip."""

    pictures: tuple[tuple[Item, ...], ...]
    size: tuple[int, int]
    actors: tuple[Actor, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Pictures or frames, uint8 (N, H, W, 3), and what is true about them."""

    pictures: NDArray[np.uint8]
    facts: Facts


Ask = Callable[[Facts, random.Random], Question | None]


@dataclass(frozen=True, eq=False)
class Task:
    """A generator of samples and its question families.

    Sample number n has geometry n % `geometries` (picture size or number of frames), so that batches of one geometry
    can be drawn. `slots` are the families and token lengths of a packed text, `answers` the closed sets of one-word
    answers; a family without one answers with a list. Families among `fillers` are asked in training only. Where a
    sample has no question for a slot, `fallbacks` are asked.
    """

    name: str
    media: Media
    geometries: int
    make: Callable[[int, str], Sample]
    families: dict[str, Ask]
    answers: dict[str, tuple[str, ...]]
    slots: tuple[tuple[str, int], ...]
    fallbacks: tuple[str, ...]
    fillers: tuple[str, ...] = ()

    @property
    def graded(self) -> tuple[str, ...]:
        """The families of the benchmark: all but those that only fill packs in training."""
        return tuple(name for name in self.families if name not in self.fillers)

    @property
    def text_tokens(self) -> int:
        """Length of a packed text."""
        return sum(length for _, length in self.slots)


def about_picture(ask: Callable[[Sequence[Item], random.Random], Question | None]) -> Ask:
    """A family of single pictures as a family of facts."""
    return lambda facts, rng: ask(facts.pictures[0], rng)


def _draw(task: Task, family: str, length: int, facts: Facts, rng: random.Random, taken: set[str]) -> Question | None:
    for _ in range(_TRIES):
        question = task.families[family](facts, rng)
        if question is None:
            return None
        if question.text not in taken and len(tokens(question)) <= length:
            return question
    return None


def draw(task: Task, facts: Facts, rng: random.Random) -> list[tuple[str, Question | None]]:
    """Family and question of every slot, none twice; ("", None) for a slot for which none is left."""
    drawn: list[tuple[str, Question | None]] = []
    taken: set[str] = set()
    for wanted, length in task.slots:
        chosen: tuple[str, Question | None] = ("", None)
        for name in (wanted, *rng.sample(task.fallbacks, len(task.fallbacks))):
            question = _draw(task, name, length, facts, rng, taken)
            if question is not None:
                taken.add(question.text)
                chosen = (name, question)
                break
        drawn.append(chosen)
    return drawn


def pack(task: Task, facts: Facts, rng: random.Random) -> Packed:
    """The questions of `draw` one behind the other; an empty slot is padding.

    Answers may have several words. Each is predicted from what stands before it, the end token at the last one.
    """
    ids: list[int] = []
    labels: list[int] = []
    families: list[str] = []
    clues: dict[int, tuple[int, ...]] = {}
    for (family, question), (_, length) in zip(draw(task, facts, rng), task.slots, strict=True):
        asked = [] if question is None else tokens(question)
        padding = length - len(asked)
        answer = len(asked) - asked.index(TOKEN[ASSISTANT]) - 1 if asked else 0
        if question is not None and question.clues:
            clues[len(ids) + len(asked) - answer - 1] = question.clues
        ids += asked + [TOKEN[PAD]] * padding
        if asked:
            labels += [IGNORED] * (len(asked) - answer - 1) + asked[-answer:] + [TOKEN[END]]
        labels += [IGNORED] * padding
        families.append(family)
    return Packed(ids, labels, families, clues)
