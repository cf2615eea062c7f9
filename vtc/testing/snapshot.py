"""Everything on a model that an engine could leave behind."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtc.engine import taps

MODEL_STATE = ("rope_deltas",)
"""Attributes that models with multi-axis positions replace with every prompt, whether an engine is attached or not."""


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Hooks and instance attributes of every module, the attention registry and the active taps.

    Two snapshots compare equal when nothing was left behind. Tensors and submodules count by identity. Run the model
    once before the first snapshot: transformers installs hooks of its own on first use.
    """
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key.startswith(("_forward", "_backward", "_state_dict", "_load_state")):
                state[f"{name}.{key}"] = [id(hook) for hook in value.values()] if isinstance(value, dict) else value
            elif key in MODEL_STATE:
                continue
            elif key not in ("_modules", "_parameters", "_buffers"):
                state[f"{name}.{key}"] = id(value)
            else:
                state[f"{name}.{key}"] = {part: id(child) for part, child in value.items()}
    registry = ALL_ATTENTION_FUNCTIONS
    state["attention"] = {key: id(value) for key, value in registry.items()}
    state["attention.local"] = dict(registry._local_mapping)
    state["taps"] = (dict(taps._taps), dict(taps._users), dict(taps._saved))
    return state
