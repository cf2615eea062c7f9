"""Accuracy of an exported model on held-out scenes, the way a user gets it: processor, `generate`, exact match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtc.errors import InputError
from vtc.eval.tiny.benchmark import Row, scene_image

CHECK_SEED = 100_000  # first scene of a check; validation during training uses the first scenes of the split


def load_model(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Processor and float32 model of an exported folder."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no exported model (config.json is missing)")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return processor, model.to(device).eval()


def chat(processor: Any, text: str) -> str:
    """The prompt of a question about one picture."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt


@torch.no_grad()
def answer(processor: Any, model: Any, images: Sequence[Image.Image], texts: Sequence[str]) -> list[str]:
    """Greedy answers to one question per picture."""
    prompts = [chat(processor, text) for text in texts]
    batch = processor(text=prompts, images=list(images), return_tensors="pt", padding=True).to(model.device)
    output = model.generate(**batch, max_new_tokens=4, do_sample=False)
    replies = processor.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def accuracy(
    folder: Path,
    rows: Sequence[Row],
    split: str = "check",
    batch_size: int = 16,
    device: str = "cpu",
    done: Callable[[int], None] = lambda questions: None,
) -> dict[str, float]:
    """Share of right answers per family and "mean" over families; `done` gets the number of new answers."""
    processor, model = load_model(folder, device)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        images = [scene_image(row.seed, split) for row in part]
        replies = answer(processor, model, images, [row.question for row in part])
        for row, reply in zip(part, replies, strict=True):
            right[row.family] += reply == row.answer
            total[row.family] += 1
        done(len(part))
    shares = {family: right[family] / total[family] for family in total}
    return shares | {"mean": sum(shares.values()) / len(shares)}
