"""Captions of scenes made from their facts, each with the claims that it makes, so that what it is true of is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.scenes import border_distance, quadrant

MAX_WORDS = 46
"""Words of the longest caption; begin and end come beside them."""
_BORDER_MARGIN = 6.0  # px to the lines between the quarters
_OPENINGS = ("a picture with", "the picture holds", "there is", "")


@dataclass(frozen=True)
class Caption:
    """A text, and what it claims of a scene; it is true of every scene whose `facts` contain these claims."""

    text: str
    claims: frozenset[str]


def facts(items: Sequence[Item]) -> frozenset[str]:
    """Every claim that is true of a scene."""
    return frozenset(claim for item in items for claim, _ in _mentions(item))


def _mentions(item: Item) -> list[tuple[str, str]]:
    """What can be said of a thing, as claims and words: of shapes the whole, the colour, the form, and with its place.

    The last is missing where it is in doubt.
    """
    if item.kind != "shape":
        return [(f"{item.kind} {item.name}", f"the {item.kind} {item.name}")]
    whole = f"{item.colour} {item.name}"
    said = f"{_article(whole)} {whole}"
    mentions = [
        (whole, said),
        (f"{item.colour} object", f"{_article(item.colour)} {item.colour} object"),
        (item.name, f"a {item.name}"),
    ]
    if border_distance(item) > _BORDER_MARGIN:
        place = quadrant(item)
        mentions.append((f"{whole} {place}", f"{said} in the {place.replace('-', ' ')}"))
    return mentions


def _article(text: str) -> str:
    return "an" if text[0] in "aeiou" else "a"


def complete(items: Sequence[Item], rng: random.Random) -> Caption:
    """Names everything in a scene, without places, in random order."""
    said = dict(_mentions(item)[0] for item in items)
    return _compose(rng.sample(sorted(said.items()), len(said)), "a picture with")


def placed(items: Sequence[Item], rng: random.Random, most: int = 3) -> Caption:
    """Names up to `most` things of a scene, shapes with their place where it is beyond doubt."""
    ways = [_mentions(item) for item in items]
    said = dict((way[3:] or way[:1])[0] for way in ways)
    return _compose(rng.sample(sorted(said.items()), min(most, len(said))), "a picture with")


def random_caption(items: Sequence[Item], rng: random.Random) -> Caption:
    """Names some things of a scene, each in one of the ways that there are, as many as fit `MAX_WORDS`."""
    order = rng.sample(list(items), rng.randint(1, len(items)))
    said: dict[str, str] = {}
    for item in order:
        ways = _mentions(item)
        claim, words = ways[rng.choices(range(len(ways)), (4, 1, 1, 3)[: len(ways)])[0]]
        said[claim] = words
    opening = rng.choice(_OPENINGS)
    while len(_compose(list(said.items()), opening).text.replace(",", " , ").split()) > MAX_WORDS:
        said.popitem()
    if len(said) == 1 and rng.random() < 0.3:  # the bare name of a class
        claim, words = next(iter(said.items()))
        return Caption(words.split(" ", 1)[1], frozenset([claim]))
    return _compose(list(said.items()), opening)


def _compose(said: Sequence[tuple[str, str]], opening: str) -> Caption:
    """The mentions as one text, with commas and an "and" in front of the last."""
    words = [word for _, word in said]
    text = words[-1] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return Caption(f"{opening} {text}".strip(), frozenset(claim for claim, _ in said))
