"""The questions of the embedded benchmarks: chosen by a fixed rule, so the committed file can be made again."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vtc.app.media import Video
from vtc.app.video_reading import frame_list
from vtc.eval.tiny.sample import Sample, Task
from vtc.eval.tiny.tasks import TASKS

PER_FAMILY = 80  # of tiny_image
QUESTIONS = {"tiny_image": PER_FAMILY, "tiny_detail": 60, "tiny_video": 60, "tiny_list": 40, "tiny_multi": 40}
"""Questions per family in the committed files."""


@dataclass(frozen=True)
class Row:
    """One benchmark question: the seed of its sample, its family, the question and its answer."""

    seed: int
    family: str
    question: str
    answer: str


@lru_cache(maxsize=256)
def sample(task: str, seed: int, split: str = "benchmark") -> Sample:
    """A sample of a task, rendered again from its seed; do not modify it, it is shared."""
    return TASKS[task].make(seed, split)


def media(task: str, seed: int, split: str = "benchmark") -> list[Image.Image] | list[Video]:
    """What a model is shown of a sample: its pictures, or its frames as one clip."""
    pictures = sample(task, seed, split).pictures
    if TASKS[task].media == "video":
        return [frame_list(pictures)]
    return [Image.fromarray(picture) for picture in pictures]


@lru_cache(maxsize=256)
def scene_image(seed: int, split: str = "benchmark") -> Image.Image:
    """The picture of a scene of tiny_image; do not modify it, it is shared."""
    return Image.fromarray(sample("tiny_image", seed, split).pictures[0])


def _quota(task: Task, family: str, per_family: int) -> Counter[str]:
    """How often each answer of a family may occur: equal shares, the first answers take what is left over.

    Lists have no closed set of answers and share one quota, under "".
    """
    answers = task.answers.get(family, ("",))
    share, rest = divmod(per_family, len(answers))
    return Counter({answer: share + (index < rest) for index, answer in enumerate(answers)})


def _sample_rows(task: Task, seed: int, split: str, left: dict[str, Counter[str]]) -> Iterator[Row]:
    """At most one question per family about one sample, counted off from what is `left`."""
    facts = task.make(seed, split).facts
    rng = random.Random(f"{split} {seed}")
    for family in task.graded:
        question = task.families[family](facts, rng)
        if question is None:
            continue
        slot = question.answer if family in task.answers else ""
        if left[family][slot] > 0:
            left[family][slot] -= 1
            yield Row(seed, family, question.text, question.answer)


def task_rows(task: Task, per_family: int, split: str = "benchmark", first_seed: int = 0) -> list[Row]:
    """`per_family` questions of every family with balanced answers, from as few samples of a split as that takes."""
    left = {family: _quota(task, family, per_family) for family in task.graded}
    rows: list[Row] = []
    seed = first_seed
    while len(rows) < per_family * len(left):
        rows += _sample_rows(task, seed, split, left)
        seed += 1
    return rows


def benchmark_rows(per_family: int = PER_FAMILY, split: str = "benchmark", first_seed: int = 0) -> list[Row]:
    """The rows of tiny_image."""
    return task_rows(TASKS["tiny_image"], per_family, split, first_seed)


def write_rows(rows: list[Row], path: Path) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
