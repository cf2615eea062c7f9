"""Training state on disk, replaced atomically so that a killed run always finds a complete one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vtc.errors import InputError

NAME = "state.pt"


@dataclass
class Progress:
    """Where a run stands: finished steps of a stage, and seconds of training before this process."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


def save(
    folder: Path,
    settings: dict[str, Any],
    progress: Progress,
    modules: dict[str, nn.Module],
    optimisers: list[Optimizer],
) -> None:
    """Write weights, optimisers, progress and random state next to the old file, then swap."""
    partial = folder / f"{NAME}.part"
    state = {
        "settings": settings,
        "progress": vars(progress),
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "random": torch.get_rng_state(),
    }
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / NAME)


def load(folder: Path, settings: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """The saved state, None if there is none; raises `InputError` if it belongs to other settings."""
    path = folder / NAME
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["settings"] != settings:
        different = sorted(key for key in settings if state["settings"].get(key) != settings[key])
        raise InputError(f"{path} holds a run with other settings ({', '.join(different)}): choose another --out")
    return state


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Load those of `tensors` that the module has under the same name and in the same shape; returns their names.

    >>> fill(nn.Linear(2, 3), {"weight": torch.zeros(3, 2), "bias": torch.zeros(4)})
    ['weight']
    """
    own = module.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    module.load_state_dict(fitting, strict=False)
    return list(fitting)
