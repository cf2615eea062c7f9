"""Rows of the image benchmarks in the columns of the real data sets, with small pictures made here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

Row = dict[str, Any]
COLOURS = ("red", "green", "blue", "yellow")
N = 2
"""Rows of each."""


def picture(number: int) -> Image.Image:
    """A small picture; no two are the same."""
    made = Image.new("RGB", (80, 60), COLOURS[number % 4])
    made.paste(COLOURS[(number + 1) % 4], (10, 10, 40, 40))
    return made


def _mmbench() -> Iterator[Row]:
    for n in range(N):
        yield {
            "index": n, "question": "Which colour?", "hint": "nan", "answer": "AB"[n], "A": "red", "B": "green",
            "C": "sky", "D": "sea", "category": "color", "L2-category": "perception", "source": "made", "split": "dev",
            "image": picture(n),
        }  # fmt: skip


def _each(**columns: Callable[[int], Any]) -> Callable[[], Iterator[Row]]:
    return lambda: ({name: make(n) for name, make in columns.items()} for n in range(N))


def _letters(n: int) -> str:
    return "AB"[n]


MAKERS: dict[str, Callable[[], Iterator[Row]]] = {
    "mme": _each(
        question_id=lambda n: "pair", question=lambda n: "Is it red? Please answer yes or no.",
        answer=lambda n: ("Yes", "No")[n], category=lambda n: "color", image=picture,
    ),
    "pope": _each(
        id=str, question_id=str, question=lambda n: "Is there a cup?", answer=lambda n: ("yes", "no")[n],
        image_source=lambda n: "made", image=picture, category=lambda n: "random",
    ),
    "gqa": _each(
        id=str, imageId=lambda n: f"n{n}", question=lambda n: "Which colour is it?", answer=lambda n: COLOURS[n],
        fullAnswer=lambda n: "",
    ),
    "vqav2_val": _each(
        question_id=int, question=lambda n: "Which colour?", image=picture, multiple_choice_answer=lambda n: "red",
        answers=lambda n: [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)],
    ),
    "textvqa_val": _each(
        question_id=int, question=lambda n: "what is written?", image=picture, answers=lambda n: ["stop"] * 10,
        ocr_tokens=lambda n: ["STOP"],
    ),
    "scienceqa_img": _each(
        image=picture, question=lambda n: "Which colour?", choices=lambda n: ["red", "green"], answer=int,
        hint=lambda n: ("", "Look.")[n],
    ),
    "mmbench_en_dev_static": _mmbench,
    "mmbench_cn_dev": _mmbench,
    "vizwiz_vqa_val": _each(
        question_id=str, image=picture, question=lambda n: "what is it?", answers=lambda n: ["cup"] * 10,
        category=lambda n: "other",
    ),
    "seedbench": _each(
        question_id=str, question=lambda n: "Which?", answer=_letters, data_type=lambda n: ("image", "video")[n],
        choice_a=lambda n: "red", choice_b=lambda n: "green", choice_c=lambda n: "blue", choice_d=lambda n: "sky",
        image=lambda n: [picture(n + i) for i in range(1 + n)],
    ),
    "docvqa_val": _each(
        questionId=str, question=lambda n: "What date?", answers=lambda n: ["1 May", "May 1"], image=picture,
    ),
    "chartqa": _each(
        type=lambda n: ("human_test", "augmented_test")[n], question=lambda n: "How many?",
        answer=lambda n: ("14", "yes")[n], image=picture,
    ),
    "ocrbench": _each(
        dataset=lambda n: ("IIIT5K", "HME100k")[n], question=lambda n: "what is written?", answer=lambda n: ["stop"],
        question_type=lambda n: ("Regular Text Recognition", "Handwritten Mathematical Expression Recognition")[n],
        image=picture,
    ),
    "infovqa_val": _each(questionId=str, question=lambda n: "How many?", answers=lambda n: ["3"], image=picture),
    "realworldqa": _each(
        question=lambda n: "Which way?\nA. left\nB. right", answer=lambda n: ("A", "0")[n], image=picture,
    ),
    "mmstar": _each(
        index=int, question=lambda n: "Which? Options: A: red, B: green, C: sky, D: sea", image=picture,
        answer=_letters, category=lambda n: ("math", "logical reasoning")[n],
        l2_category=lambda n: ("geometry", "diagram reasoning")[n],
    ),
    "vstar_bench": _each(
        image=picture, text=lambda n: "What colour is it? (A) red (B) green (C) blue (D) sky", label=_letters,
        category=lambda n: ("direct_attributes", "relative_position")[n], question_id=str,
    ),
    "ai2d": _each(
        question=lambda n: "What is A?", options=lambda n: ["leaf", "root", "stem", "seed"], answer=str, image=picture,
    ),
    "refcoco_bbox_rec_val": _each(
        question_id=str, image=picture, question=lambda n: "", answer=lambda n: ["the red one", "left"][: 1 + n],
        bbox=lambda n: [10.0, 10.0, 30.0, 30.0], segmentation=lambda n: [1.0, 1.0, 5.0, 5.0],
    ),
}  # fmt: skip
"""Name of a task -> its rows."""

BESIDES: dict[str, Callable[[], Iterator[Row]]] = {
    "lmms-lab-encoder/GQA:testdev_balanced_images": _each(id=lambda n: f"n{n}", image=picture),
}
"""Data sets that the tasks' code loads besides."""
