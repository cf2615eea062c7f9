"""Questions have the answer their text asks for, and the benchmark is balanced."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from vtc.errors import InputError
from vtc.eval.tiny.benchmark import PER_FAMILY, benchmark_rows, write_rows
from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.layout import SLOTS
from vtc.eval.tiny.packing import tokens
from vtc.eval.tiny.questions import ANSWERS, FAMILIES, Question
from vtc.eval.tiny.scenes import SIZE, make_scene
from vtc.eval.tiny.vocabulary import TOKEN, UNKNOWN, encode

COMMITTED = Path(__file__).resolve().parents[2] / "eval" / "tasks" / "tiny_image" / "tiny_image.jsonl"
SINGULAR = {"crosses": "cross", "circles": "circle", "squares": "square", "triangles": "triangle", "stars": "star"}


def _named(items: Sequence[Item], colour: str, name: str) -> Item:
    (found,) = [item for item in items if (item.colour, item.name) == (colour, name)]
    return found


def _side(a: Item, b: Item) -> str:
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    return {(True, True): "right", (True, False): "left", (False, True): "below", (False, False): "above"}[
        abs(dx) > abs(dy), (dx if abs(dx) > abs(dy) else dy) > 0
    ]


def _in(item: Item, vertical: str, horizontal: str) -> bool:
    x, y = item.centre
    return (y > SIZE / 2) == (vertical == "bottom") and (x > SIZE / 2) == (horizontal == "right")


def solve(items: Sequence[Item], text: str) -> str:
    """Answer a question from its words alone and the list of things."""
    shapes = [item for item in items if item.kind == "shape"]
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", text):
        return "yes" if any((item.colour, item.name) == match.groups() for item in shapes) else "no"
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        (item,) = [item for item in shapes if item.name == match[1]]
        return item.colour
    if match := re.fullmatch(r"What shape is the (\w+) object\?", text):
        (item,) = [item for item in shapes if item.colour == match[1]]
        return item.name
    if match := re.fullmatch(r"How many (\w+)( objects)? are there\?", text):
        wanted = match[1] if match[2] else SINGULAR.get(match[1], match[1].removesuffix("s"))
        number = sum(wanted == (item.colour if match[2] else item.name) for item in shapes)
        return ("zero", "one", "two", "three", "four")[number]
    if match := re.fullmatch(r"Where is the (\w+) (\w+) relative to the (\w+) (\w+)\?", text):
        return _side(_named(shapes, match[1], match[2]), _named(shapes, match[3], match[4]))
    if match := re.fullmatch(r"What (shape|color) is in the (top|bottom) (left|right)\?", text):
        (item,) = [item for item in shapes if _in(item, match[2], match[3])]
        return item.name if match[1] == "shape" else item.colour
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\?", text):
        item = _named(shapes, match[1], match[2])
        return next(f"{v}-{h}" for v in ("top", "bottom") for h in ("left", "right") if _in(item, v, h))
    kind = {"What digit is shown?": "digit", "What word is written?": "word"}[text]
    (item,) = [item for item in items if item.kind == kind]
    return item.name


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, Sequence[Item], Question]]:
    rng = random.Random(5)
    found = []
    for seed in range(300):
        items = make_scene(seed, "check").items
        for family, ask in FAMILIES.items():
            question = ask(items, rng)
            if question is not None:
                found.append((family, items, question))
    return found


def test_answers_follow_from_the_text_and_the_things(asked: list[tuple[str, Sequence[Item], Question]]) -> None:
    assert {family for family, _, _ in asked} == set(FAMILIES)
    for family, items, question in asked:
        assert question.answer == solve(items, question.text), (family, question, items)
        assert question.answer in ANSWERS[family]


def test_relations_are_clear_cut(asked: list[tuple[str, Sequence[Item], Question]]) -> None:
    for family, items, question in asked:
        if family == "relation":
            match = re.findall(r"the (\w+) (\w+)", question.text)
            a, b = (_named(items, *pair) for pair in match)
            small, large = sorted(abs(u - v) for u, v in zip(a.centre, b.centre, strict=True))
            assert large > 1.4 * small


def test_most_negatives_share_a_colour_or_a_shape(asked: list[tuple[str, Sequence[Item], Question]]) -> None:
    shared = total = 0
    for family, items, question in asked:
        if family == "existence" and question.answer == "no":
            colour, name = question.text.rstrip("?").split()[-2:]
            total += 1
            shared += any(colour == item.colour or name == item.name for item in items if item.kind == "shape")
    assert total > 100 and shared / total > 0.8


def test_the_vocabulary_covers_every_question_and_slots_fit(asked: list[tuple[str, Sequence[Item], Question]]) -> None:
    longest: Counter[str] = Counter()
    for family, _, question in asked:
        ids = tokens(question)
        assert TOKEN[UNKNOWN] not in ids
        assert len(encode(question.answer)) == 1
        longest[family] = max(longest[family], len(ids))
    assert all(longest[family] <= length for family, length in SLOTS)


def test_a_word_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="elephant"):
        encode("Is there an elephant?")


def test_the_committed_benchmark_is_what_the_rule_makes(tmp_path: Path) -> None:
    write_rows(benchmark_rows(), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == COMMITTED.read_text()


def test_the_benchmark_is_balanced_and_right() -> None:
    rows = [json.loads(line) for line in COMMITTED.read_text().splitlines()]
    assert len(rows) == PER_FAMILY * len(FAMILIES) == 720
    for family, answers in ANSWERS.items():
        counts = Counter(row["answer"] for row in rows if row["family"] == family)
        assert sum(counts.values()) == PER_FAMILY
        assert set(counts) == set(answers)
        assert max(counts.values()) - min(counts.values()) <= 1
    for row in rows:
        assert solve(make_scene(row["seed"], "benchmark").items, row["question"]) == row["answer"]


def test_check_questions_use_other_scenes_than_the_benchmark() -> None:
    check = benchmark_rows(2, "check", 100_000)
    assert min(row.seed for row in check) >= 100_000
    assert all(set(asdict(row)) == {"seed", "family", "question", "answer"} for row in check)
