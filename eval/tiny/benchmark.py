"""The questions of the embedded benchmark: chosen by a fixed rule, so the committed file can be made again."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vtc.eval.tiny.questions import ANSWERS, FAMILIES
from vtc.eval.tiny.scenes import make_scene

PER_FAMILY = 80


@dataclass(frozen=True)
class Row:
    """One benchmark question: the seed of its scene, its family, the question and its answer."""

    seed: int
    family: str
    question: str
    answer: str


@lru_cache(maxsize=256)
def scene_image(seed: int, split: str = "benchmark") -> Image.Image:
    """The picture of a scene, rendered again from its seed; do not modify it, it is shared."""
    return Image.fromarray(make_scene(seed, split).image)


def _quota(family: str, per_family: int) -> dict[str, int]:
    """How often each answer of a family may occur: equal shares, the first answers take what is left over."""
    answers = ANSWERS[family]
    share, rest = divmod(per_family, len(answers))
    return {answer: share + (index < rest) for index, answer in enumerate(answers)}


def _scene_rows(seed: int, split: str, left: dict[str, Counter[str]]) -> Iterator[Row]:
    """At most one question per family about one scene, counted off from what is `left`."""
    items = make_scene(seed, split).items
    rng = random.Random(f"{split} {seed}")
    for family, ask in FAMILIES.items():
        question = ask(items, rng)
        if question is not None and left[family][question.answer] > 0:
            left[family][question.answer] -= 1
            yield Row(seed, family, question.text, question.answer)


def benchmark_rows(per_family: int = PER_FAMILY, split: str = "benchmark", first_seed: int = 0) -> list[Row]:
    """`per_family` questions of every family with balanced answers, from as few scenes of a split as that takes."""
    left = {family: Counter(_quota(family, per_family)) for family in FAMILIES}
    rows: list[Row] = []
    seed = first_seed
    while len(rows) < per_family * len(FAMILIES):
        rows += _scene_rows(seed, split, left)
        seed += 1
    return rows


def write_rows(rows: list[Row], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
