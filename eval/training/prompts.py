"""Batches of complete prompts through a model's own processor: one sample and one question about it per row."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import BatchFeature

from vtc.adapters.placement import device_of
from vtc.app.loading import Loaded
from vtc.eval.tiny.batches import scene_numbers
from vtc.eval.tiny.family import encoded
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.questions import Question
from vtc.eval.tiny.sample import Facts, Sample, Task

BATCH = 20


def draw(task: Task, facts: Facts, rng: random.Random) -> Question:
    """A question of a random family of the benchmark that the sample has an unambiguous question of."""
    for family in rng.sample(sorted(task.graded), len(task.graded)):
        question = task.families[family](facts, rng)
        if question is not None:
            return question
    raise AssertionError(f"a sample of {task.name} has no question")


def asked(loaded: Loaded, task: Task, samples: Sequence[Sample], questions: Sequence[Question]) -> BatchFeature:
    """Inputs of the model, left-padded, as at inference."""
    pictures, texts = [sample.pictures for sample in samples], [question.text for question in questions]
    inputs: BatchFeature = encoded(loaded.processor, task.media, pictures, texts)
    return inputs


def answered(loaded: Loaded, inputs: BatchFeature, questions: Sequence[Question]) -> BatchFeature:
    """Inputs of `asked` with answer and end token behind each prompt, and labels (B, T) on these."""
    tokenizer = loaded.processor.tokenizer
    ends = [
        [*tokenizer(question.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for question in questions
    ]
    longest = max(map(len, ends))
    tails = torch.tensor([[*end, *[tokenizer.pad_token_id] * (longest - len(end))] for end in ends])
    real = torch.tensor([[1] * len(end) + [0] * (longest - len(end)) for end in ends])

    def behind(rows: Tensor, tail: Tensor) -> Tensor:
        """Both side by side, padding behind shorter answers moved to the front."""
        joined = torch.cat([rows, tail.to(rows.dtype)], 1)
        return torch.stack([row.roll(longest - len(end)) for row, end in zip(joined, ends, strict=True)])

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    by_token = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    made = {name: behind(inputs[name], torch.zeros_like(tails)) for name in by_token}
    made |= {"input_ids": behind(ids, tails), "attention_mask": behind(mask, real)}
    made["labels"] = behind(torch.full_like(ids, IGNORED), tails.masked_fill(real == 0, IGNORED))
    return BatchFeature({**inputs, **made})


def training_batch(loaded: Loaded, task: Task, seed: int, step: int, size: int, different: int) -> BatchFeature:
    """The batch of a step, of about `different` training samples in all; it depends on nothing but the arguments."""
    kinds, rng = task.geometries, random.Random(f"prompts {seed} {step}")
    numbers = scene_numbers(seed, step // kinds * size, size, max(size, different // kinds))
    samples = _made(task, numbers, step)
    questions = [draw(task, sample.facts, rng) for sample in samples]
    return answered(loaded, asked(loaded, task, samples, questions), questions)


def plain_prompts(loaded: Loaded, task: Task, count: int, seed: int) -> Iterator[BatchFeature]:
    """Batches of `count` questions about training samples on the model's device, without their answers."""
    rng = random.Random(f"calibration {seed}")
    for start in range(0, count, BATCH):
        samples = _made(task, range(start, min(start + BATCH, count)), start // BATCH)
        batch = asked(loaded, task, samples, [draw(task, sample.facts, rng) for sample in samples])
        yield batch.to(device_of(loaded.model))


def _made(task: Task, numbers: Sequence[int], kind: int) -> list[Sample]:
    """Training samples of one geometry, since a processor stacks clips of one length only."""
    kinds = task.geometries
    return [task.make(number * kinds + kind % kinds, "train") for number in numbers]
