"""The training loop: the frozen embedded model answers questions through the compressor, resumable at any moment."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vtc
from vtc import adapters
from vtc.app.loading import Loaded, load
from vtc.errors import InputError
from vtc.eval.tiny import checkpoint, optim
from vtc.eval.tiny.export import export
from vtc.eval.tiny.loop import pick_device
from vtc.eval.tiny.progress import Reporter
from vtc.eval.training.measure import Measurement, measure
from vtc.eval.training.prompts import training_batch
from vtc.eval.training.settings import TrainingSettings, asked
from vtc.method import weights as store
from vtc.method.learned import LearnedCompressor

WEIGHTS = "weights.safetensors"
StepHook = Callable[[int], None]


@dataclass
class Trainer:
    """Model, method, its module and the data of a run."""

    settings: TrainingSettings
    out: Path
    device: torch.device
    loaded: Loaded
    method: LearnedCompressor
    handle: vtc.Handle

    @classmethod
    def create(cls, settings: TrainingSettings, out: Path, device: torch.device) -> Trainer:
        """Fresh learned parts from the seed of the settings, attached to the model."""
        torch.manual_seed(settings.seed)
        loaded = load(settings.model, device=device.type, dtype="float32")
        model = loaded.model.requires_grad_(False)
        method = settings.compressor()
        handle = vtc.compress(model, method, retention=settings.retention, pad_output=True, trace=False)
        if settings.start is not None:
            begin_with(settings.start, handle.module)
        if settings.llm_rate:
            for part in (model.model.language_model, model.lm_head):
                part.requires_grad_(True)
        return cls(settings, out, device, loaded, method, handle)

    @property
    def model(self) -> Any:
        """The model that answers."""
        return self.loaded.model

    @property
    def module(self) -> nn.Module:
        """The learned parts."""
        module = self.handle.module
        assert module is not None
        return module

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"module": self.module} | ({"model": self.model} if self.settings.llm_rate else {})

    def optimiser(self) -> torch.optim.Optimizer:
        """AdamW with one group for the learned parts and one for the LLM if it is trained."""
        groups: list[dict[str, Any]] = [{"params": list(self.module.parameters()), "peak": self.settings.rate}]
        if self.settings.llm_rate:
            own = [p for p in self.model.parameters() if p.requires_grad]
            groups.append({"params": own, "peak": self.settings.llm_rate})
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=self.settings.weight_decay)

    def losses(self, step: int) -> dict[str, Tensor]:
        """The answer loss of a step's batch, and what the method adds."""
        of = self.settings
        batch = training_batch(self.loaded, asked(of.task), of.seed, step, of.batch_size, of.scenes)
        output = self.model(**batch.to(self.device), use_cache=False)
        own = self.handle.auxiliary_loss
        return {"answer": output.loss} | ({} if own is None else {"method": own})

    def step(self, number: int, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        """One update; returns the losses before it."""
        share = optim.rate(self.settings.stage, number) / self.settings.rate
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share
        losses = self.losses(number)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.settings.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def save_weights(self, notes: dict[str, str]) -> Path:
        """Write the learned parts with the record of the run."""
        about = {
            "base_model": self.settings.model,
            "steps": str(self.settings.steps),
            "seed": str(self.settings.seed),
            "data": f"{self.settings.scenes} samples of {self.settings.task}, split train, one question per row",
            "training": json.dumps(self.settings.as_dict(), sort_keys=True),
        }
        if self.settings.start is not None:
            about["start"] = store.read(self.settings.start)[1].get("training", "")
        return self.method.save(self.out / WEIGHTS, self.module, adapters.of(self.model).spec, about | notes)

    def check(self, per_family: int) -> Measurement:
        """Accuracy on held-out scenes with what has been learned so far."""
        path = self.save_weights({})
        method = dataclasses.replace(self.method, training=False, weights=str(path))
        changed = self.model.state_dict() if self.settings.llm_rate else None
        of = self.settings
        return measure(of.model, method, of.retention, per_family, task=of.task, state=changed, device=self.device.type)


def begin_with(source: str, module: nn.Module | None) -> None:
    """Fill what fits of `module` from stored weights. Raises InputError where nothing does.

    >>> begin_with("atp-tiny-llava", nn.Linear(2, 2))
    Traceback (most recent call last):
        ...
    vtc.errors.InputError: start='atp-tiny-llava' holds no tensor ...
    """
    if module is None or not checkpoint.fill(module, store.read(source)[0]):
        raise InputError(
            f"start={source!r} holds no tensor whose name and shape are those of one in this module; give weights of "
            "the same method and width"
        )


def train(
    out: Path,
    settings: TrainingSettings,
    device: str = "auto",
    threads: int = 1,
    save_every: int = 50,
    check_every: int = 200,
    per_family: int = 40,
    on_step: StepHook = lambda step: None,
) -> Path:
    """Train a compressor into `out`, or go on with the run that `out` holds; returns the weights `out/weights...`.

    threads: CPU threads (0: torch's choice). save_every: distance of checkpoints in steps; check_every: of checks on
    held-out samples with `per_family` questions of every family (0: none). `on_step(finished steps)` is called after
    every step. A trained LLM is exported to `out/model`.

    >>> train(Path("runs/none"), TrainingSettings("fastv"))
    Traceback (most recent call last):
        ...
    vtc.errors.VTCError: 'fastv' ...
    """
    chosen = pick_device(device)
    if threads > 0:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    with Reporter(out / "log.jsonl") as reporter:
        trainer = Trainer.create(settings, out, chosen)
        with trainer.handle:
            optimiser = trainer.optimiser()
            progress = _resume(trainer, optimiser)
            _run(trainer, optimiser, progress, reporter, save_every, (check_every, per_family), on_step)
            notes = {"seconds": str(round(progress.seconds))}
            if per_family:
                result = trainer.check(per_family)
                reporter.log(settings.stage, progress.step, progress.seconds, result.numbers())
                notes["held_out"] = json.dumps({k: round(v, 4) for k, v in result.numbers().items()})
            path = trainer.save_weights(notes)
    if settings.llm_rate:
        export(trainer.model, out / "model")
    return path


def _run(
    trainer: Trainer,
    optimiser: torch.optim.Optimizer,
    progress: checkpoint.Progress,
    reporter: Reporter,
    save_every: int,
    checks: tuple[int, int],
    on_step: StepHook,
) -> None:
    settings = trainer.settings
    started, before = time.monotonic(), progress.seconds
    reporter.begin(settings.stage, progress.step)
    while progress.step < settings.steps:
        losses = trainer.step(progress.step, optimiser)
        progress.step += 1
        progress.seconds = before + time.monotonic() - started
        reporter.step(losses)
        finished = progress.step == settings.steps
        if checks[0] and progress.step % checks[0] == 0 and not finished:
            reporter.log(settings.stage, progress.step, progress.seconds, trainer.check(checks[1]).numbers())
        if progress.step % save_every == 0 or finished:
            checkpoint.save(trainer.out, settings.as_dict(), progress, trainer.modules, [optimiser])
        on_step(progress.step)


def _resume(trainer: Trainer, optimiser: torch.optim.Optimizer) -> checkpoint.Progress:
    """Load the checkpoint of the output folder, if there is one."""
    state = checkpoint.load(trainer.out, trainer.settings.as_dict(), trainer.device)
    if state is None:
        return checkpoint.Progress()
    for name, module in trainer.modules.items():
        module.load_state_dict(state["modules"][name])
    optimiser.load_state_dict(state["optimisers"][0])
    torch.set_rng_state(state["random"].cpu())
    return checkpoint.Progress(**state["progress"])
