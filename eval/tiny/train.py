"""Training from nothing to an exported folder, in two stages, resumable at any moment.

Stage "tower" trains the vision tower on its auxiliary losses. Stage "joint" adds the projector and the language model
and answers packed questions. Both see complete pictures only: no visual token is ever dropped.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import InputError
from vtc.eval.tiny import checkpoint, layout, optim, record
from vtc.eval.tiny.batches import Batch, make_batch, scene_numbers
from vtc.eval.tiny.cache import SceneCache, render_scenes
from vtc.eval.tiny.export import export
from vtc.eval.tiny.mixture import MixTrainer, MixValidation
from vtc.eval.tiny.model import TRAINING_ATTENTION, AuxiliaryHeads, answer_logits, build_model, see
from vtc.eval.tiny.packing import IGNORED
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.recipes import Recipe
from vtc.eval.tiny.settings import Settings, Stage
from vtc.eval.tiny.validation import Validation
from vtc.eval.tiny.vocabulary import END, TOKEN

VALIDATION_SCENES = 256
VALIDATE_EVERY = 200  # steps
StepHook = Callable[[str, int], None]


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

    @classmethod
    def create(cls, settings: Settings, out: Path, device: torch.device, scenes: SceneCache) -> Trainer:
        """Fresh weights from the seed of the settings."""
        torch.manual_seed(settings.seed)
        model = build_model(settings.shape, TRAINING_ATTENTION).to(device).train()
        heads = AuxiliaryHeads(settings.shape.hidden).to(device)
        mask = layout.additive_mask(torch.bfloat16, device)
        return cls(settings, out, device, scenes, model, heads, mask, layout.positions().to(device))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"model": self.model, "heads": self.heads}

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates."""
        source = self.model if stage.language else self.model.model.vision_tower
        return [*source.named_parameters(), *((f"heads.{n}", p) for n, p in self.heads.named_parameters())]

    def losses(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        """Unweighted losses of one batch."""
        with torch.autocast(self.device.type, torch.bfloat16):
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


def run_stage(
    trainer: Any,
    index: int,
    progress: checkpoint.Progress,
    state: dict[str, Any] | None,
    validation: Any,
    reporter: Reporter,
    save_every: int,
    on_step: StepHook,
) -> None:
    """Train the rest of one stage, saving and validating on the way; `state` is the checkpoint it continues, if any."""
    settings, stage = trainer.settings, trainer.settings.stages[index]
    parameters = trainer.trained(stage)
    optimisers = optim.make_optimisers(parameters, settings.weight_decay)
    if state is not None:
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    started, before = time.monotonic(), progress.seconds

    def save() -> None:
        progress.seconds = before + time.monotonic() - started
        checkpoint.save(trainer.out, settings.as_dict(), progress, trainer.modules, optimisers)

    reporter.start(stage, progress.step)
    while progress.step < stage.steps:
        optim.set_rate(optimisers, optim.rate(stage, progress.step))
        losses = trainer.losses(trainer.batch(index, progress.step), stage)
        trainer.total(losses, stage).backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], settings.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        reporter.advance({name: float(loss.detach()) for name, loss in losses.items()})
        finished = progress.step == stage.steps
        if progress.step % VALIDATE_EVERY == 0 or finished:
            seconds = before + time.monotonic() - started
            reporter.log(stage, progress.step, seconds, validation.measure(trainer, stage))
        if progress.step % save_every == 0 or finished:
            save()
        on_step(stage.name, progress.step)


def pick_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: write auto, cpu or cuda") from error


def train(
    out: Path,
    settings: Settings | None = None,
    device: str = "auto",
    threads: int = 0,
    workers: int | None = None,
    save_every: int = 50,
    on_step: StepHook = lambda stage, step: None,
) -> Path:
    """Train a model into `out`, or go on with the run that `out` holds; returns the exported folder `out/model`.

    `threads` is the number of CPU threads (0: torch's choice), `workers` that of the processes that render scenes
    (default: as many as threads), `save_every` the distance of checkpoints in steps. `on_step(stage name, finished
    steps)` is called after every step.
    """
    settings = settings or Settings()
    chosen = pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        count = torch.get_num_threads() if workers is None else workers
        scenes = render_scenes(out / "scenes", "train", settings.scenes, count, reporter.rendering(settings.scenes))
        trainer = Trainer.create(settings, out, chosen, scenes)
        progress, state = _resume(trainer)
        validation = Validation.create(out / "scenes", min(VALIDATION_SCENES, settings.scenes))
        while progress.stage < len(settings.stages):
            run_stage(trainer, progress.stage, progress, state, validation, reporter, save_every, on_step)
            progress = checkpoint.Progress(progress.stage + 1, 0, progress.seconds)
            state = None
    folder = out / "model"
    export(trainer.model, folder)
    record.write(folder, settings.as_dict(), progress.seconds, chosen.type)
    return folder


def train_mixture(
    out: Path,
    recipe: Recipe,
    device: str = "auto",
    threads: int = 0,
    save_every: int = 50,
    on_step: StepHook = lambda stage, step: None,
    compiled: bool = False,
) -> Path:
    """Like `train`, for a recipe that mixes tasks. `compiled` makes steps faster and the start slower, by minutes."""
    chosen = pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        trainer = MixTrainer.create(recipe, out, chosen)
        progress, state = _resume(trainer)
        validation = MixValidation.create(recipe, out / "samples")
        if compiled:
            trainer.compile()
        while progress.stage < len(recipe.stages):
            run_stage(trainer, progress.stage, progress, state, validation, reporter, save_every, on_step)
            progress = checkpoint.Progress(progress.stage + 1, 0, progress.seconds)
            state = None
    folder = out / "model"
    export(trainer.exported(), folder, trainer.processor)
    record.write(folder, recipe.as_dict(), progress.seconds, chosen.type)
    return folder


def _resume(trainer: Any) -> tuple[checkpoint.Progress, dict[str, Any] | None]:
    """Load the checkpoint of the output folder into the trainer, if there is one."""
    state = checkpoint.load(trainer.out, trainer.settings.as_dict(), trainer.device)
    if state is None:
        return checkpoint.Progress(), None
    for name, module in trainer.modules.items():
        module.load_state_dict(state["modules"][name])
    torch.set_rng_state(state["random"].cpu())
    progress = checkpoint.Progress(**state["progress"])
    if progress.step == trainer.settings.stages[progress.stage].steps:
        return checkpoint.Progress(progress.stage + 1, 0, progress.seconds), None
    return progress, state
