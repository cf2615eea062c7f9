"""Training from nothing to an exported folder, in two stages, resumable at any moment.

Stage "tower" trains the vision tower on its auxiliary losses. Stage "joint" adds the projector and the language model
and answers packed questions. Both see complete pictures only: no visual token is ever dropped.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.eval.tiny import layout, loop, record
from vtc.eval.tiny.batches import Batch, make_batch, scene_numbers
from vtc.eval.tiny.cache import SceneCache, render_scenes
from vtc.eval.tiny.export import export
from vtc.eval.tiny.model import TRAINING_ATTENTION, AuxiliaryHeads, answer_logits, build_model, see
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.settings import Settings, Stage
from vtc.eval.tiny.validation import Validation
from vtc.eval.tiny.vocabulary import END, TOKEN

VALIDATION_SCENES = 256


@dataclass
class Trainer:
    """Model, auxiliary heads and data of a run on one device."""

    settings: Settings
    out: Path
    device: torch.device
    scenes: SceneCache
    model: Any
    heads: AuxiliaryHeads
    mask: Tensor
    positions: Tensor
    validation: Validation

    @classmethod
    def create(cls, settings: Settings, out: Path, device: torch.device, scenes: SceneCache) -> Trainer:
        """Fresh weights from the seed of the settings."""
        torch.manual_seed(settings.seed)
        model = build_model(settings.shape, TRAINING_ATTENTION).to(device).train()
        heads = AuxiliaryHeads(settings.shape.hidden).to(device)
        mask = layout.additive_mask(loop.products(device), device)
        validation = Validation.create(out / "scenes", min(VALIDATION_SCENES, settings.scenes))
        return cls(settings, out, device, scenes, model, heads, mask, layout.positions().to(device), validation)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"model": self.model, "heads": self.heads}

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates."""
        source = self.model if stage.language else self.model.model.vision_tower
        return [*source.named_parameters(), *((f"heads.{n}", p) for n, p in self.heads.named_parameters())]

    def measure(self, stage: Stage) -> dict[str, float]:
        """Accuracies on held-out scenes."""
        return self.validation.measure(self, stage)

    def losses(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        """Unweighted losses of one batch."""
        with loop.mixed(self.device):
            vision = see(self.model, batch.pixels)
            losses: dict[str, Tensor] = self.heads(vision, batch.targets, batch.present)
            if stage.language:
                logits = answer_logits(self.model, vision.patches, batch.ids, self.positions, self.mask)
                losses["answer"] = self._answer_loss(logits, batch.labels)
        return losses

    def _answer_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the answers, plus a little of the end tokens behind them."""
        asked = labels != IGNORED
        loss = F.cross_entropy(logits[asked].float(), labels[asked], reduction="none")
        weight = torch.where(labels[asked] == TOKEN[END], self.settings.end_weight, 1.0)
        return (loss * weight).sum() / weight.sum()

    def total(self, losses: dict[str, Tensor], stage: Stage) -> Tensor:
        """Weighted sum to minimise."""
        auxiliary = losses["content"] + losses["place"] + losses["presence"]
        if not stage.language:
            return auxiliary
        return self.settings.language_weight * losses["answer"] + self.settings.auxiliary_weight * auxiliary

    def batch(self, index: int, step: int) -> Batch:
        """Batch of a step of a stage; the scenes go on where the stage before ended."""
        size, before = self.settings.batch_size, sum(stage.steps for stage in self.settings.stages[:index])
        numbers = scene_numbers(self.settings.seed, (before + step) * size, size, len(self.scenes))
        rng = random.Random(f"{self.settings.seed} {index} {step}")
        return make_batch(self.scenes, numbers, rng, self.device)


def train(
    out: Path,
    settings: Settings | None = None,
    device: str = "auto",
    threads: int = 0,
    workers: int | None = None,
    save_every: int = 50,
    on_step: loop.StepHook = lambda stage, step: None,
) -> Path:
    """Train a model into `out`, or go on with the run that `out` holds; returns the exported folder `out/model`.

    `threads` is the number of CPU threads (0: torch's choice), `workers` that of the processes that render scenes
    (default: as many as threads), `save_every` the distance of checkpoints in steps. `on_step(stage name, finished
    steps)` is called after every step.
    """
    settings = settings or Settings()
    chosen = loop.pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        count = torch.get_num_threads() if workers is None else workers
        scenes = render_scenes(out / "scenes", "train", settings.scenes, count, reporter.rendering(settings.scenes))
        trainer = Trainer.create(settings, out, chosen, scenes)
        seconds = loop.run(trainer, reporter, save_every, on_step)
    folder = out / "model"
    export(trainer.model, folder)
    record.write(folder, settings.as_dict(), seconds, chosen.type)
    return folder
