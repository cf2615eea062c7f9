"""Putting the shortened output back at its input positions, for training with labels."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.call import Call
from vtc.errors import UnsupportedCall


def spread(call: Call, hidden: Tensor) -> Tensor:
    """[B, L, D] output rows at their input positions, [B, S, D]; zeros where a token was removed."""
    valid = call.valid_rows().to(hidden.device)
    place = torch.where(valid, call.source.to(hidden.device), call.length)
    full = hidden.new_zeros(call.batch, call.length + 1, hidden.shape[-1])
    row = torch.arange(call.batch, device=hidden.device)[:, None]
    return full.index_put((row, place), hidden)[:, :-1]


def check_labels(call: Call, labels: Tensor | None) -> None:
    """Raise UnsupportedCall when a label's predecessor was removed, so that nothing predicts it. Synchronises."""
    if labels is None:
        return
    alive = call.over_input(call.source, call.valid).to(labels.device)
    if bool(((labels[:, 1:] != -100) & ~alive[:, :-1]).any()):
        raise UnsupportedCall(
            "a label follows a removed token, so nothing predicts it; set labels of padding and of whatever follows a "
            "visual token to -100"
        )
