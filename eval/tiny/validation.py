"""Quick accuracy on held-out scenes during training, by scoring packed questions."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtc.eval.tiny import loop
from vtc.eval.tiny.batches import Batch, make_batch
from vtc.eval.tiny.cache import SceneCache, render_scenes
from vtc.eval.tiny.heads import CellHeads
from vtc.eval.tiny.layout import SLOTS
from vtc.eval.tiny.model import AuxiliaryHeads, answer_logits, see
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.targets import PATCH_CLASSES
from vtc.eval.tiny.vocabulary import END, TOKEN

if TYPE_CHECKING:
    from vtc.eval.tiny.train import Trainer

_BATCH = 64


def content_accuracy(heads: AuxiliaryHeads | CellHeads, patches: Tensor, targets: Tensor) -> dict[str, tuple[int, int]]:
    """Right and all patches that hold something, per kind of content."""
    counts = {}
    for index, (name, logits) in enumerate(zip(PATCH_CLASSES, heads.content_logits(patches), strict=True)):
        filled = targets[:, index] > 0
        right = (logits.argmax(-1) == targets[:, index]) & filled
        counts[f"patch {name}"] = (int(right.sum()), int(filled.sum()))
    return counts


def answer_accuracy(logits: Tensor, batch: Batch) -> dict[str, tuple[int, int]]:
    """Right and all answers per family."""
    is_answer = (batch.labels != IGNORED) & (batch.labels != TOKEN[END])
    right = (logits.argmax(-1) == batch.labels) & is_answer
    parts = torch.split(right, [length for _, length in SLOTS], dim=1)
    hits = torch.stack([part.any(1) for part in parts], dim=1)
    counts: dict[str, tuple[int, int]] = {}
    for row, families in zip(hits.tolist(), batch.families, strict=True):
        for hit, family in zip(row, families, strict=True):
            good, all_ = counts.get(family, (0, 0))
            counts[family] = (good + hit, all_ + 1)
    return counts


@dataclass(frozen=True)
class Validation:
    """Held-out scenes with a fixed random text each."""

    scenes: SceneCache

    @classmethod
    def create(cls, folder: Path, count: int) -> Validation:
        """Render the first `count` scenes of the split "check"."""
        return cls(render_scenes(folder, "check", count, 0))

    @torch.no_grad()
    def measure(self, trainer: Trainer, stage: Stage) -> dict[str, float]:
        """Accuracy per kind of patch content, and per family where the stage trains the language model."""
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for start in range(0, len(self.scenes), _BATCH):
            numbers = range(start, min(start + _BATCH, len(self.scenes)))
            batch = make_batch(self.scenes, numbers, random.Random(start), trainer.device)
            with loop.mixed(trainer.device):
                vision = see(trainer.model, batch.pixels)
                counts = content_accuracy(trainer.heads, vision.patches, batch.targets)
                if stage.language:
                    logits = answer_logits(trainer.model, vision.patches, batch.ids, trainer.positions, trainer.mask)
                    counts |= answer_accuracy(logits, batch)
            for name, (good, all_) in counts.items():
                right[name] += good
                total[name] += all_
        return {name: right[name] / total[name] for name in total if total[name]}
