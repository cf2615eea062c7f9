"""Several questions about each picture of a batch in one sequence, in the words of the chat template."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtc.eval.mini.language import END, IMAGE
from vtc.eval.tiny import lists
from vtc.eval.tiny.detail import quadrant
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.sample import Facts, Task, draw

_MARK = "QUESTION"
_LIST = ("list", 64)


def with_list(task: Task) -> Task:
    """The task with a last slot that asks for all shapes: many words about each picture, in training only."""
    families = {**task.families, _LIST[0]: _every_shape}
    return replace(task, families=families, slots=(*task.slots, _LIST), fillers=(*task.fillers, _LIST[0]))


def _every_shape(facts: Facts, rng: random.Random) -> Question | None:
    """All shapes from side to side, every second time each with its quarter where that is beyond doubt."""
    if rng.random() < 0.5:
        return lists.objects(facts, rng)
    placed = [replace(item, name=f"{item.name} {quadrant(item, facts.size)}".strip()) for item in facts.pictures[0]]
    asked = lists.objects(replace(facts, pictures=(tuple(placed),)), rng)
    return asked and replace(asked, text=asked.text.replace("List", "Where is"))


@dataclass(frozen=True)
class Text:
    """Questions about B pictures: ids and next-token labels (B, T), tokens of each slot, families (B, slots)."""

    ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    families: list[list[str]]


class Writer:
    """Writes what stands in front of the pictures' questions, and the questions, as a processor's prompts have them."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        content = [{"type": "image"}, {"type": "text", "text": _MARK}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        before, self._behind = prompt.split(_MARK)
        front, back = before.split(IMAGE)
        self.end: int = self._tokenizer.convert_tokens_to_ids(END)
        self.before, self.after = self._ids(front), self._ids(back)
        """Ids in front of the visual tokens and between them and the question."""

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def slot(self, question: Question) -> tuple[list[int], list[int]]:
        """Ids of a question with its answer, and labels: the answer and the end, each where it is predicted."""
        asked, answer = self._ids(question.text + self._behind), self._ids(question.answer)
        return asked + answer, [IGNORED] * (len(asked) - 1) + answer + [self.end]

    def write(self, task: Task, facts: Sequence[Facts], rng: random.Random) -> Text:
        """Random questions about pictures of one task; the longest of each slot decides its length."""
        asked_of = with_list(task)
        drawn = [draw(asked_of, known, rng) for known in facts]
        slots = [[([], []) if asked is None else self.slot(asked) for _, asked in row] for row in drawn]
        lengths = tuple(max(1, *(len(ids) for ids, _ in column)) for column in zip(*slots, strict=True))

        def table(which: int, fill: int) -> Tensor:
            rows = [
                [
                    token
                    for slot, length in zip(row, lengths, strict=True)
                    for token in _padded(slot[which], length, fill)
                ]
                for row in slots
            ]
            return torch.tensor(rows)

        return Text(table(0, self.end), table(1, IGNORED), lengths, [[family for family, _ in row] for row in drawn])


def _padded(ids: list[int], length: int, fill: int) -> list[int]:
    return ids + [fill] * (length - len(ids))
