"""The generated tasks: the same pixels everywhere, answers that follow from what happens, balance, what they need."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vtc.app.decoders import open_clip
from vtc.eval.tiny import clips, detail, lists, multi
from vtc.eval.tiny.benchmark import QUESTIONS, task_rows, write_rows
from vtc.eval.tiny.canvas import COLOURS, Item
from vtc.eval.tiny.checking import glance
from vtc.eval.tiny.clip_questions import TEMPORAL
from vtc.eval.tiny.packing import tokens
from vtc.eval.tiny.sample import Facts, Task, pack
from vtc.eval.tiny.tasks import TASKS
from vtc.eval.tiny.vocabulary import EXTENDED, NUMBERS, PLURALS, TOKEN, VOCABULARY, encode

NEW = [task for name, task in TASKS.items() if name != "tiny_image"]
FOLDER = Path(__file__).resolve().parents[2] / "eval" / "tasks"
DIGESTS = {
    ("tiny_detail", "train"): "807d57c0a4332536cf1e6561c87e6a0031c4d5b1510815b0f1f66ea16363b88e",
    ("tiny_detail", "benchmark"): "9fc30fd262017b02c25e47ee8b6522f47461ac2562f89e30fa6610625c1e487a",
    ("tiny_video", "train"): "b24eedf4cf441e1e48fd2e41065f9b33b06054bb012b8b776035360533961be0",
    ("tiny_video", "benchmark"): "d38f6106744b787358dfefede9c6eb119237df34888dded160ca16cc65ea709e",
    ("tiny_list", "train"): "9be80f92c47d366a1151558f8188474d9ff72733c9abc564e4c6424b4e131e9b",
    ("tiny_list", "benchmark"): "6016340bce02097f816a73ab94d8de01d4154d848fb0accf8106bf3feae230bf",
    ("tiny_multi", "train"): "05487bcccc43bcec03b32bdb747159dd04851a7fde724e4205a008e34bdbf80a",
    ("tiny_multi", "benchmark"): "a7b152f3bbeb5a470dd782d0a405aa91e618ea3317ffdb8670f815ec05acef93",
}


@pytest.mark.parametrize("task", NEW, ids=lambda task: task.name)
def test_pixels_are_the_same_everywhere(task: Task) -> None:
    for split, seed in (("train", 0), ("benchmark", 1)):
        digest = hashlib.sha256(task.make(seed, split).pictures.tobytes()).hexdigest()
        assert digest == DIGESTS[task.name, split], (task.name, split)


def test_only_training_sees_the_training_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.eval.tiny import canvas

    asked: list[bool] = []
    real = canvas.draw_digit

    def spy(rng: np.random.Generator, train: bool) -> tuple[np.ndarray, int]:
        asked.append(train)
        return real(rng, train)

    monkeypatch.setattr(canvas, "draw_digit", spy)
    for task in NEW:
        for split in ("train", "check", "benchmark"):
            asked.clear()
            for seed in range(6):
                task.make(seed, split)
            assert asked and set(asked) == {split == "train"}


def _matches(item: Item, name: str) -> bool:
    return name in (f"{item.colour} {item.name}", item.colour, item.name)


def _centre(facts: Facts, item: Item) -> str:
    (x, y), (height, width) = item.centre, facts.size
    return f"{'bottom' if y > height / 2 else 'top'}-{'right' if x > width / 2 else 'left'}"


def solve_detail(facts: Facts, text: str) -> str:
    (items,) = facts.pictures
    if match := re.fullmatch(r"What (word|digit) is (?:written|shown|in the (\w+) (\w+))\?", text):
        found = [i for i in items if i.kind == match[1]]
        if match[2]:
            found = [i for i in found if _centre(facts, i) == f"{match[2]}-{match[3]}"]
        (item,) = found
        return item.name
    sized = {"large": [i for i in items if i.kind == "shape" and i.width > 20]}
    sized["small"] = [i for i in items if i.kind == "shape" and i.width < 20]
    if match := re.fullmatch(r"What shape is the (small|large) (\w+) object\?", text):
        (item,) = [i for i in sized[match[1]] if i.colour == match[2]]
        return item.name
    if match := re.fullmatch(r"Where is the large (\w+ \w+)\?", text):
        (item,) = [i for i in sized["large"] if _matches(i, match[1])]
        return _centre(facts, item)
    assert text == "How many large objects are there?"
    return NUMBERS[len(sized["large"])]


def solve_list(facts: Facts, text: str) -> str:
    match = re.fullmatch(r"(?:List every object|Read all (\w+)) from (\w+) to \w+\.", text)
    assert match is not None
    kind = (match[1] or "shapes").removesuffix("s")
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}[match[2]]
    found = sorted((i for i in facts.pictures[0] if i.kind == kind), key=lambda i: sign * i.centre[axis])
    return ", ".join(f"{i.colour} {i.name}".strip() for i in found)


def solve_multi(facts: Facts, text: str) -> str:
    shapes = [[i for i in items if i.kind == "shape"] for items in facts.pictures]
    if text == "Which picture holds the most objects?":
        sizes = [len(items) for items in shapes]
        assert sizes.count(max(sizes)) == 1
        return multi.ORDINALS[sizes.index(max(sizes))]
    if match := re.fullmatch(r"Which picture holds the (\w+) (\w+)\?", text):
        kind = [i.kind == "word" and i.name == match[2] for items in facts.pictures for i in items]
        holders = [
            any(
                i.kind == "word" and i.name == match[2] if match[1] == "word" else _matches(i, f"{match[1]} {match[2]}")
                for i in items
            )
            for items in facts.pictures
        ]
        assert sum(holders) == 1 and (match[1] != "word" or any(kind))
        return multi.ORDINALS[holders.index(True)]
    if match := re.fullmatch(r"How many pictures hold a (\w+)\?", text):
        return NUMBERS[sum(any(i.name == match[1] for i in items) for items in shapes)]
    match = re.fullmatch(r"What (\w+) is (?:the (\w+)(?: object)? )?in the (\w+) picture\?", text)
    assert match is not None
    index = multi.ORDINALS.index(match[3])
    if match[2]:
        (item,) = [i for i in shapes[index] if _matches(i, match[2])]
        return item.name if match[1] == "shape" else item.colour
    (item,) = [i for i in facts.pictures[index] if i.kind == match[1]]
    return item.name


def solve_video(facts: Facts, text: str) -> str:
    """From what is drawn in every frame; only the travelled way comes from the path of the actor."""

    def seen(name: str) -> list[bool]:
        return [any(_matches(i, name) for i in items if i.kind == "shape") for items in facts.pictures]

    def starts(name: str) -> list[int]:
        here = seen(name)
        return [t for t in range(len(here)) if here[t] and not (t and here[t - 1])]

    def moving(name: str) -> list[bool]:
        (actor,) = [a for a in facts.actors if f"{a.colour} {a.name}" == name]
        return [a != b for a, b in pairwise(actor.path)]

    guests = {f"{a.colour} {a.name}" for a in facts.actors if not all(seen(f"{a.colour} {a.name}"))}
    if match := re.fullmatch(r"Which way does the (\w+ \w+) move\?", text):
        (actor,) = [a for a in facts.actors if f"{a.colour} {a.name}" == match[1]]
        at = moving(match[1]).index(True)
        dx, dy = (
            (b - a + clips.SIZE / 2) % clips.SIZE - clips.SIZE / 2
            for a, b in zip(actor.path[at], actor.path[at + 1], strict=True)
        )
        return next(n for n, step in clips.STEPS.items() if np.allclose(np.sign([dx, dy]).round(), step, atol=1e-6))
    if match := re.fullmatch(r"Does the (\w+ \w+) appear before the (\w+ \w+)\?", text):
        (a,), (b,) = starts(match[1]), starts(match[2])
        return "yes" if a < b else "no"
    if match := re.fullmatch(r"What (shape|color) appears (first|last)\?", text):
        order = sorted((t, name) for name in guests for t in starts(name))
        colour, name = order[0 if match[2] == "first" else -1][1].split()
        return name if match[1] == "shape" else colour
    if match := re.fullmatch(r"How many times does the (\w+ \w+) appear\?", text):
        return NUMBERS[len(starts(match[1]))]
    if match := re.fullmatch(r"Does the (\w+ \w+) move while the (\w+ \w+) is shown\?", text):
        steps = moving(match[1])
        frames = [t for t, here in enumerate(seen(match[2])) if here]
        around = [any(steps[max(t - 1, 0) : t + 1]) for t in frames]  # it moves from or to that frame
        assert all(around) or not any(around)
        return "yes" if all(around) else "no"
    if match := re.fullmatch(r"What color is the (\w+)\?", text):
        (found,) = {a.colour for a in facts.actors if a.name == match[1]}
        return found
    kind = {"What word is written?": "word", "What digit is shown?": "digit"}[text]
    (item,) = [i for items in facts.pictures for i in items if i.kind == kind]
    return item.name


SOLVERS = {
    "tiny_detail": solve_detail,
    "tiny_list": solve_list,
    "tiny_multi": solve_multi,
    "tiny_video": solve_video,
}


@pytest.mark.parametrize("task", NEW, ids=lambda task: task.name)
def test_answers_follow_from_the_text_and_the_things(task: Task) -> None:
    rng = random.Random(1)
    asked: Counter[str] = Counter()
    for seed in range(120):
        facts = task.make(seed, "check").facts
        for family in task.graded:
            question = task.families[family](facts, rng)
            if question is not None:
                asked[family] += 1
                assert question.answer == SOLVERS[task.name](facts, question.text), (seed, question)
                assert family not in task.answers or question.answer in task.answers[family]
    assert min(asked.values()) >= 25 and set(asked) == set(task.graded)


@pytest.mark.parametrize("task", list(TASKS.values()), ids=lambda task: task.name)
def test_packs_ask_every_question_once_and_fit(task: Task) -> None:
    rng = random.Random(2)
    filled = total = 0
    for seed in range(60):
        facts = task.make(seed, "train").facts
        text = pack(task, facts, rng)
        assert len(text.ids) == len(text.labels) == task.text_tokens
        assert max(text.ids) < len(EXTENDED)
        filled, total = filled + sum(map(bool, text.families)), total + len(task.slots)
        for family, length in task.slots:
            question = task.families[family](facts, rng)
            assert question is None or len(tokens(question)) <= length, (family, question)
    assert filled > 0.75 * total


@pytest.mark.parametrize("task", NEW, ids=lambda task: task.name)
def test_the_committed_questions_are_what_the_rule_makes_and_balanced(task: Task, tmp_path: Path) -> None:
    rows = task_rows(task, QUESTIONS[task.name])
    write_rows(rows, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == (FOLDER / task.name / f"{task.name}.jsonl").read_text()
    for family in task.graded:
        counts = Counter(row.answer for row in rows if row.family == family)
        assert sum(counts.values()) == QUESTIONS[task.name]
        if family in task.answers:
            assert set(counts) == set(task.answers[family])
            assert max(counts.values()) - min(counts.values()) <= 1


def test_words_keep_their_numbers() -> None:
    assert EXTENDED[: len(VOCABULARY)] == VOCABULARY and len(set(EXTENDED)) == len(EXTENDED)
    digest = hashlib.sha256(" ".join(EXTENDED).encode()).hexdigest()
    assert digest == "87934851c48bbd4cd022dcb6d20398de0c92d55edd980f767bda7081965b1651"
    assert len(TOKEN) == 159


def test_lists_have_8_to_40_tokens_and_an_unambiguous_order() -> None:
    for seed in range(60):
        facts = lists.make(seed, "check").facts
        for family in ("objects", "words", "digits"):
            question = lists.TASK.families[family](facts, random.Random(seed))
            if question is not None:
                assert 8 <= len(encode(question.answer)) <= 40
        centres = sorted(i.centre[0] for i in facts.pictures[0] if i.kind == "shape")
        assert all(b - a >= 5 for a, b in pairwise(centres))


def test_small_things_lose_themselves_in_the_overview() -> None:
    """At a glance a small shape covers fewer than 7 pixels, a large one at least 14 along one axis."""
    for seed in range(40):
        made = detail.make(seed, "check")
        small = glance(detail.TASK, made.pictures)
        assert small.shape == (1, 84, 84, 3)
        scale = 84 / max(made.facts.size)
        for item in made.facts.pictures[0]:
            if item.kind == "shape" and item.width < 20:
                assert item.width * scale < 7
            elif item.kind == "shape":
                assert item.width * 84 / min(made.facts.size) >= 14


def test_a_single_frame_does_not_tell_what_happens() -> None:
    """The best guess from what the middle frame shows is right about as often as the majority, measured on facts."""
    rng = random.Random(3)
    by_hint: dict[str, dict[object, Counter[str]]] = {family: {} for family in TEMPORAL}
    answers: dict[str, Counter[str]] = {family: Counter() for family in TEMPORAL}
    for seed in range(700):
        facts = _facts_only(seed)
        middle = facts.pictures[len(facts.pictures) // 2]
        for family in ("direction", "order", "while"):
            question = clips_family(family)(facts, rng)
            if question is None:
                continue
            names = re.findall(r"the (\w+ \w+)", question.text)
            if family == "direction":
                x, y = next(i.centre for i in middle if _matches(i, names[0]))
                hint: object = (int(x // 28), int(y // 28))
            else:
                hint = tuple(any(_matches(i, name) for i in middle) for name in names)
            by_hint[family].setdefault(hint, Counter())[question.answer] += 1
            answers[family][question.answer] += 1
    for family, slack in (("direction", 0.09), ("order", 0.12), ("while", 0.12)):
        total = answers[family].total()
        majority = max(answers[family].values()) / total
        informed = sum(max(counts.values()) for counts in by_hint[family].values()) / total
        assert informed < majority + slack, (family, informed, majority)


def clips_family(name: str):  # type: ignore[no-untyped-def]
    return TASKS["tiny_video"].families[name]


def _facts_only(seed: int) -> Facts:
    return clips.make(seed, "check").facts


def test_clips_survive_being_written_as_mp4(tmp_path: Path) -> None:
    """Frames read back through the decoder are those of the clip, in order, but for what the codec changes."""
    av = pytest.importorskip("av")
    for seed in (0, 3, 4):
        frames = clips.make(seed, "benchmark").pictures
        file = tmp_path / f"{seed}.mp4"
        with av.open(str(file), "w") as container:
            stream = container.add_stream("mpeg4", rate=24)
            stream.width = stream.height = clips.SIZE
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = 4_000_000
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        source = open_clip(file)
        assert len(source.seconds) == len(frames)
        read = np.stack(source.frames(range(len(frames))))
        error = np.abs(read.astype(int)[:, None] - frames.astype(int)[None]).mean(axis=(2, 3, 4))
        assert (error.argmin(axis=1) == np.arange(len(frames))).all()
        assert error.diagonal().max() < 16


def test_plurals_and_colours_are_words_of_the_vocabulary() -> None:
    assert set(PLURALS.values()) | set(COLOURS) <= set(EXTENDED)
