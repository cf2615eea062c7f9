"""The shortened output back at its input positions: for training with labels, and for rows asked for by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.engine.call import Call
from vtc.errors import UnsupportedCall


def spread(call: Call, hidden: Tensor, group: int | None = None) -> Tensor:
    """[B, L, D] rows at their input positions, [B, S, D]; zeros where a token was removed.

    group: first layer of the group that the rows left; None for the last one.
    """
    source, valid = (call.source, call.valid) if group is None else call.sources[group]
    source = source.to(hidden.device)
    place = source if valid is None else torch.where(valid.to(hidden.device), source, call.length)
    full = hidden.new_zeros(call.batch, call.length + 1, hidden.shape[-1])
    row = torch.arange(call.batch, device=hidden.device)[:, None]
    return full.index_put((row, place), hidden)[:, :-1]


def asks_rows(given: dict[str, Any]) -> bool:
    """True where `logits_to_keep` numbers rows of the input, which removed tokens would shift.

    0 asks for all rows and 1 for the last, which both mean the same of a shortened sequence.
    """
    wanted = given.get("logits_to_keep")
    return isinstance(wanted, Tensor) or (wanted is not None and wanted > 1)


def align(call: Call, output: Any) -> None:
    """Put every field of a language model's output that has rows back at the input positions."""
    states = getattr(output, "hidden_states", None)
    if states is not None:
        starts = sorted(call.sources)
        groups = [max(start for start in starts if start <= max(0, number - 1)) for number in range(len(states))]
        output.hidden_states = tuple(
            None if rows is None else spread(call, rows, group) for rows, group in zip(states, groups, strict=True)
        )
    output.last_hidden_state = spread(call, output.last_hidden_state)


def check_attentions(kwargs: dict[str, Any], config: Any, aligned: bool) -> None:
    """Raise UnsupportedCall for attention matrices, whose two axes of kept rows have no place in an aligned output."""
    wanted = kwargs.get("output_attentions")
    if aligned and (config.output_attentions if wanted is None else wanted):
        raise UnsupportedCall(
            "output_attentions=True with pad_output=True: attention is computed among kept tokens only and has no rows "
            "for the others; attach without pad_output, or leave output_attentions out"
        )


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
