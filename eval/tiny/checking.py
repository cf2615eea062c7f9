"""Accuracy of an exported model on held-out samples, the way a user gets it: processor, `generate`, exact match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtc.errors import InputError
from vtc.eval.tiny import scoring
from vtc.eval.tiny.benchmark import Row, sample
from vtc.eval.tiny.family import encoded, prompt
from vtc.eval.tiny.sample import Media, Task
from vtc.eval.tiny.tasks import TASKS

CHECK_SEED = 100_000  # first sample of a check; validation during training uses the first samples of the split
GLANCE = 84  # px
_LIST_TOKENS, _WORD_TOKENS = 40, 4


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Processor and float32 model of an exported folder."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no exported model (config.json is missing)")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return processor, model.to(device).eval()


def chat(processor: Any, text: str) -> str:
    """The prompt of a question about one picture."""
    return prompt(processor, "image", 1, text)


@torch.no_grad()
def answer(
    processor: Any,
    model: Any,
    media: Media,
    pictures: Sequence[NDArray[np.uint8]],
    texts: Sequence[str],
    max_new_tokens: int = _WORD_TOKENS,
) -> list[str]:
    """Greedy answers to one question per sample; samples are uint8 (N, H, W, 3) of one size."""
    batch = encoded(processor, media, pictures, texts).to(model.device)
    output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    replies = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def glance(task: Task, pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What a model sees at a glance: of a clip the frame in the middle, of pictures 84 px overviews."""
    if task.media == "video":
        middle: NDArray[np.uint8] = pictures[len(pictures) // 2][None]
        return middle
    small = [Image.fromarray(picture).resize((GLANCE, GLANCE), Image.Resampling.BICUBIC) for picture in pictures]
    return np.stack([np.asarray(picture) for picture in small])


def accuracy(
    folder: Path,
    rows: Sequence[Row],
    split: str = "check",
    batch_size: int = 16,
    device: str = "cpu",
    done: Callable[[int], None] = lambda questions: None,
    task: str = "tiny_image",
    *,
    glanced: bool = False,
) -> dict[str, float]:
    """Mean score per family of a task, and "mean" over families; `done` gets the number of new answers.

    With `glanced` the model gets the `glance` of every sample instead of the whole.
    """
    processor, model = load_model(folder, device)
    asked = TASKS[task]
    total: Counter[str] = Counter()
    points: dict[str, float] = dict.fromkeys((row.family for row in rows), 0.0)
    shapes: dict[tuple[bool, tuple[int, ...]], list[Row]] = {}
    for row in rows:  # samples of one size go together, and lists, which take longer, by themselves
        key = (row.family in asked.answers, sample(task, row.seed, split).pictures.shape)
        shapes.setdefault(key, []).append(row)
    for (one_word, _), alike in shapes.items():
        for start in range(0, len(alike), batch_size):
            part = alike[start : start + batch_size]
            pictures = [sample(task, row.seed, split).pictures for row in part]
            if glanced:
                pictures = [glance(asked, shown) for shown in pictures]
            length = _WORD_TOKENS if one_word else _LIST_TOKENS
            replies = answer(processor, model, asked.media, pictures, [row.question for row in part], length)
            for row, reply in zip(part, replies, strict=True):
                points[row.family] += scoring.score(asked, row.family, reply, row.answer)
                total[row.family] += 1
            done(len(part))
    shares = {family: points[family] / total[family] for family in points}
    return shares | {"mean": sum(shares.values()) / len(shares)}
