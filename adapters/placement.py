"""Where a model computes, which is not where its weights lie if accelerate brings them from memory or disk."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device on which a call of `model` begins.

    Weights that accelerate offloads are on the meta device but for the moment in which their module runs; its hooks
    know where that is.

    >>> device_of(nn.Linear(2, 3))
    device(type='cpu')
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(model.parameters()).device
