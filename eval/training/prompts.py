"""Batches of complete prompts: one scene and one question per row, with labels on the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from vtc.eval.tiny.batches import normalise, scene_numbers
from vtc.eval.tiny.cache import SceneCache
from vtc.eval.tiny.canvas import Item
from vtc.eval.tiny.layout import VISUAL_TOKENS
from vtc.eval.tiny.packing import IGNORED, tokens
from vtc.eval.tiny.questions import FAMILIES, Question
from vtc.eval.tiny.vocabulary import BEGIN, END, IMAGE, PAD, TOKEN, USER


def draw(items: Sequence[Item], rng: random.Random) -> Question:
    """A question of a random family that the scene has an unambiguous question of."""
    for family in rng.sample(sorted(FAMILIES), len(FAMILIES)):
        question = FAMILIES[family](items, rng)
        if question is not None:
            return question
    raise AssertionError("a question about existence can always be asked")


def collate(questions: Sequence[Question], answers: bool = True) -> dict[str, Tensor]:
    """Left-padded ids, mask and labels of the prompts; labels cover the answer and the end token.

    answers: False leaves answer, end token and labels away, as at inference.
    """
    head = [TOKEN[BEGIN], TOKEN[USER], *[TOKEN[IMAGE]] * VISUAL_TOKENS]
    rows = [[*head, *tokens(question), TOKEN[END]] for question in questions]
    if not answers:
        rows = [row[:-2] for row in rows]
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    ids = torch.tensor([[TOKEN[PAD]] * pad + row for pad, row in zip(padding, rows, strict=True)])
    mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if answers:
        batch["labels"] = torch.where(torch.arange(length) >= length - 2, ids, IGNORED)
    return batch


def training_batch(scenes: SceneCache, seed: int, step: int, size: int) -> dict[str, Tensor]:
    """The batch of a step: pixels, ids, mask and labels. It depends on nothing but the arguments."""
    numbers = scene_numbers(seed, step * size, size, len(scenes))
    rng = random.Random(f"prompts {seed} {step}")
    questions = [draw(scenes.items[number], rng) for number in numbers]
    return {"pixel_values": normalise(scenes.pixels(numbers)), **collate(questions)}
