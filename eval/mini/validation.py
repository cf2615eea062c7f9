"""Accuracy on held-out pictures during training, by scoring packed questions."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import torch

from vtc.eval.mini.features import MIX
from vtc.eval.tiny import loop
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.settings import Stage
from vtc.eval.tiny.validation import content_accuracy

if TYPE_CHECKING:
    from vtc.eval.mini.train import MiniTrainer

CHECKED = 48  # pictures, half of each task
_BATCH = 4


@torch.no_grad()
def measure(trainer: MiniTrainer, stage: Stage) -> dict[str, float]:
    """Share of right patches per kind of content, and of right answers, whole ones, per task and family."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for kind, task in enumerate(MIX):
        every = range(kind, CHECKED, len(MIX))
        for start in range(0, len(every), _BATCH):
            rng = random.Random(start) if stage.language else None  # the same questions at every validation
            batch = trainer.make(trainer.checked, list(every[start : start + _BATCH]), rng)
            with loop.mixed(trainer.device):
                rows = trainer.projector(batch.features)
                for name, (good, all_) in content_accuracy(trainer.heads, rows, batch.targets).items():
                    right[name] += good
                    total[name] += all_
                if batch.text is None:
                    continue
                logits = trainer.model.lm_head(trainer.hidden(rows, batch.text, stage))
            labels = batch.text.labels.to(trainer.device)
            wrong = (logits.argmax(-1) != labels) & (labels != IGNORED) & (labels != trainer.writer.end)
            failed = torch.stack([part.any(1) for part in torch.split(wrong, list(batch.text.lengths), 1)], 1).tolist()
            for misses, families in zip(failed, batch.text.families, strict=True):
                for miss, family in zip(misses, families, strict=True):
                    if family:
                        name = f"{task.name.removeprefix('tiny_')}/{family}"
                        right[name] += not miss
                        total[name] += 1
    return {name: right[name] / total[name] for name in sorted(total) if total[name]}
