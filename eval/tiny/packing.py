"""Fill the slots of the packed layout with random questions about one scene."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.layout import SLOTS
from vtc.eval.tiny.questions import FAMILIES, Question
from vtc.eval.tiny.vocabulary import ASSISTANT, END, PAD, TOKEN, encode

IGNORED = -100
_FALLBACKS = ("referring", "location", "existence")  # asked where a scene has no question for the family of a slot


@dataclass(frozen=True)
class Packed:
    """One packed text: ids and next-token labels, TEXT_TOKENS each, and the families really asked, one per slot.

    clues: those of questions that have any, by the place of the token from which their answer is predicted.
    """

    ids: list[int]
    labels: list[int]
    families: list[str]
    clues: dict[int, tuple[int, ...]] = field(default_factory=dict)


def tokens(question: Question) -> list[int]:
    """Question, `ASSISTANT:` and answer as they follow the picture in a prompt."""
    return [*encode(question.text), TOKEN[ASSISTANT], *encode(question.answer)]


def _ask(family: str, length: int, items: Sequence[Item], rng: random.Random) -> tuple[str, list[int]]:
    """A question of the family, or of another one that fits into the slot."""
    for name in (family, *rng.sample(_FALLBACKS, len(_FALLBACKS))):
        question = FAMILIES[name](items, rng)
        if question is not None and len(ids := tokens(question)) <= length:
            return name, ids
    raise AssertionError("a question about existence can always be asked and fits every slot")


def pack(items: Sequence[Item], rng: random.Random) -> Packed:
    """Draw one question per slot. The answer is predicted at `ASSISTANT:`, the end token at the answer."""
    ids: list[int] = []
    labels: list[int] = []
    families: list[str] = []
    for family, length in SLOTS:
        name, asked = _ask(family, length, items, rng)
        padding = length - len(asked)
        ids += asked + [TOKEN[PAD]] * padding
        labels += [IGNORED] * (len(asked) - 2) + [asked[-1], TOKEN[END]] + [IGNORED] * padding
        families.append(name)
    return Packed(ids, labels, families)
