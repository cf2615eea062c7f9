"""Optimisers and learning-rate schedule of the training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from vtc.eval.tiny.settings import Stage

_NOT_HIDDEN = ("embed", "lm_head", "content", "place", "presence", "low_rank")
"""Inputs and outputs of the network, and factors, of which only the product is a matrix between hidden layers."""


def make_optimisers(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Optimizer]:
    """Muon for the matrices between hidden layers, AdamW for embeddings, heads, biases and norms."""
    hidden: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_hidden = parameter.ndim == 2 and not any(part in name for part in _NOT_HIDDEN)
        (hidden if is_hidden else other).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=0.0, betas=(0.9, 0.98), weight_decay=weight_decay),
    ]


def rate(stage: Stage, step: int) -> float:
    """Learning rate of step number `step` (from 0) of a stage."""
    warm = min(1.0, (step + 1) / stage.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.rate * warm * (stage.floor + (1 - stage.floor) * cosine)


def set_rate(optimisers: Iterable[Optimizer], value: float) -> None:
    """Give every parameter group the learning rate `value`."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = value


class _Float32(TorchFunctionMode):
    """What asks for bfloat16 gets float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: torch.float32 if each is torch.bfloat16 else each for name, each in (kwargs or {}).items()}
        return func(*args, **given)


def orthogonal_in(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Inside this context Muon, which makes its steps orthogonal in bfloat16, does so in float32 if that is `dtype`."""
    return _Float32() if dtype == torch.float32 else nullcontext()
