"""Optimisers and learning-rate schedule of the training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from vtc.eval.tiny.settings import Stage

_NOT_HIDDEN = ("embed", "lm_head", "content", "place", "presence")  # inputs and outputs of the network


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
