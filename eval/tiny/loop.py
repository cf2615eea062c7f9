"""The loop that every training here runs: stages, optimisers, checkpoints, validation, and going on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtc.errors import InputError
from vtc.eval.tiny import checkpoint, optim
from vtc.eval.tiny.progress import Reporter
from vtc.eval.tiny.settings import Stage

VALIDATE_EVERY = 200  # steps
StepHook = Callable[[str, int], None]


class Plan(Protocol):
    """Settings of a run."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is trained in turn."""

    @property
    def weight_decay(self) -> float:
        """Of all parameters."""

    @property
    def clip(self) -> float:
        """Largest norm of the gradient."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values: a checkpoint belongs to a run if these are equal."""


class Trainable(Protocol):
    """Model and data of a run."""

    @property
    def settings(self) -> Plan:
        """What the run is made of."""

    out: Path
    device: torch.device

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""

    def trained(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that a stage updates."""

    def batch(self, index: int, step: int) -> Any:
        """Batch of a step of stage number `index`; a function of these two and the settings."""

    def losses(self, batch: Any, stage: Stage) -> dict[str, Tensor]:
        """Unweighted losses of one batch."""

    def total(self, losses: dict[str, Tensor], stage: Stage) -> Tensor:
        """Weighted sum to minimise."""

    def measure(self, stage: Stage) -> dict[str, float]:
        """Accuracies on held-out samples."""


def pick_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: write auto, cpu or cuda") from error


def products(device: torch.device) -> torch.dtype:
    """Type of the products of matrices: bfloat16 where the hardware multiplies it, elsewhere float32.

    oneDNN multiplies it on every CPU with AVX-512, without instructions for it at a fifth of the speed of float32.
    """
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.float32 if device.type == "cpu" and not able else torch.bfloat16


def mixed(device: torch.device) -> torch.autocast:
    """Inside this context products are computed in the type of `products`."""
    dtype = products(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def run(trainer: Trainable, reporter: Reporter, save_every: int, on_step: StepHook, log_every: int = 0) -> float:
    """Train what is left of a run; returns the seconds that it took in all.

    `save_every` is the distance of checkpoints in steps, `log_every` that of losses in the log, which are there at
    every validation anyway. `on_step(stage name, finished steps)` is called after every step.
    """
    progress, state = _resume(trainer)
    while progress.stage < len(trainer.settings.stages):
        _run_stage(trainer, progress.stage, progress, state, reporter, save_every, on_step, log_every)
        progress = checkpoint.Progress(progress.stage + 1, 0, progress.seconds)
        state = None
    return progress.seconds


def _run_stage(
    trainer: Trainable,
    index: int,
    progress: checkpoint.Progress,
    state: dict[str, Any] | None,
    reporter: Reporter,
    save_every: int,
    on_step: StepHook,
    log_every: int,
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

    reporter.begin(stage, progress.step)
    while progress.step < stage.steps:
        optim.set_rate(optimisers, optim.rate(stage, progress.step))
        losses = trainer.losses(trainer.batch(index, progress.step), stage)
        trainer.total(losses, stage).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], settings.clip)
        with optim.orthogonal_in(products(trainer.device)):
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        reporter.step({name: float(loss.detach()) for name, loss in losses.items()})
        finished = progress.step == stage.steps
        if progress.step % VALIDATE_EVERY == 0 or finished:
            seconds = before + time.monotonic() - started
            reporter.log(stage, progress.step, seconds, trainer.measure(stage))
        elif log_every and progress.step % log_every == 0:
            reporter.log(stage, progress.step, before + time.monotonic() - started, {})
        if progress.step % save_every == 0 or finished:
            save()
        on_step(stage.name, progress.step)


def _resume(trainer: Trainable) -> tuple[checkpoint.Progress, dict[str, Any] | None]:
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
