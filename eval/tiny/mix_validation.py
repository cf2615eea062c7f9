"""Quick accuracy on held-out samples of every task during training, by scoring packed questions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtc.eval.tiny import loop
from vtc.eval.tiny.mixed_batches import MixedBatch, streams
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.stream import Stream
from vtc.eval.tiny.validation import content_accuracy
from vtc.eval.tiny.vocabulary import END, TOKEN

if TYPE_CHECKING:
    from vtc.eval.tiny.mixture import MixTrainer

CHECKED = 96  # samples of every task
_BATCH = 32


def held_out(recipe: Recipe, folder: Path) -> list[Stream]:
    """The first samples of the split "check"."""
    count = min(CHECKED, recipe.different)
    made = streams(recipe, folder, "check")
    return [replace(stream, different=max(1, count // stream.task.geometries)) for stream in made]


def slot_hits(batch: MixedBatch, logits: Tensor) -> Iterator[tuple[str, int, int]]:
    """Family, right answers and answers of every slot; of a list its words, given those before, count one by one."""
    asked = (batch.labels != IGNORED) & (batch.labels != TOKEN[END])
    right = (logits.argmax(-1) == batch.labels) & asked
    lengths = [length for _, length in batch.task.slots]
    good = torch.stack([part.sum(1) for part in torch.split(right, lengths, 1)], 1).tolist()
    every = torch.stack([part.sum(1) for part in torch.split(asked, lengths, 1)], 1).tolist()
    for names, hits, totals in zip(batch.families, good, every, strict=True):
        for name, hit, number in zip(names, hits, totals, strict=True):
            if name:
                yield f"{batch.task.name.removeprefix('tiny_')}/{name}", hit, number


@torch.no_grad()
def measure(trainer: MixTrainer, series: Sequence[Stream], stage: Stage) -> dict[str, float]:
    """Accuracy per kind of cell content; with the language model trained, also of places and per task and family."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for stream in series:
        for start in range(0, stream.different, _BATCH):
            numbers = range(start, min(start + _BATCH, stream.different))
            batch = trainer.make(stream, numbers, random.Random(start))  # the same questions at every validation
            with loop.mixed(trainer.device):
                seen = trainer.family.see(trainer.model, batch.task.media, batch.inputs)
                counts = list(content_accuracy(trainer.heads, seen.cells, batch.targets).items())
                found = [(name, good, every) for name, (good, every) in counts]
                if stage.language:
                    hidden, read = trainer.answered(batch, seen)
                    found += slot_hits(batch, trainer.model.lm_head(hidden))
                    if batch.places is not None:
                        found += trainer.places.hits(read, batch.places, batch.clues)
            for name, good, every in found:
                right[name] += good
                total[name] += every
    return {name: right[name] / total[name] for name in sorted(total) if total[name]}
