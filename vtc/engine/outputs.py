"""The shortened output back at its input positions: for training with labels, and for rows asked for by number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.batch.rows import Batch, Rows
from vtc.engine.llm_pass import LLMPass
from vtc.errors import UnsupportedCall


def spread(rows: Rows, length: int, hidden: Tensor) -> Tensor:
    """[B, L, D] rows at their input positions, [B, length, D]; zeros where a token was removed."""
    source, held = rows.source.to(hidden.device), rows.held.to(hidden.device)
    full = hidden.new_zeros(len(source), length + 1, hidden.shape[-1])
    row = torch.arange(len(source), device=hidden.device)[:, None]
    return full.index_put((row, torch.where(held, source, length)), hidden)[:, :-1]


def asks_rows(given: dict[str, Any]) -> bool:
    """True where `logits_to_keep` numbers rows of the input, which removed tokens would shift.

    0 asks for all rows and 1 for the last, which both mean the same of a shortened sequence.
    """
    wanted = given.get("logits_to_keep")
    return isinstance(wanted, Tensor) or (wanted is not None and wanted > 1)


def align(one: LLMPass, output: Any) -> None:
    """Put every field of a language model's output that has rows back at the input positions."""
    states = getattr(output, "hidden_states", None)
    if states is not None:
        groups = [max(start for start in one.left if start <= max(0, number - 1)) for number in range(len(states))]
        output.hidden_states = tuple(
            None if hidden is None else spread(one.left[group], one.now.length, hidden)
            for hidden, group in zip(states, groups, strict=True)
        )
    output.last_hidden_state = spread(one.now.rows, one.now.length, output.last_hidden_state)


def check_attentions(kwargs: dict[str, Any], config: Any, aligned: bool) -> None:
    """Raise UnsupportedCall for attention matrices, whose two axes of kept rows have no place in an aligned output."""
    wanted = kwargs.get("output_attentions")
    if aligned and (config.output_attentions if wanted is None else wanted):
        raise UnsupportedCall(
            "output_attentions=True with pad_output=True: attention is computed among kept tokens only and has no rows "
            "for the others; attach without pad_output, or leave output_attentions out"
        )


def check_labels(batch: Batch, labels: Tensor | None) -> None:
    """Raise UnsupportedCall when a label's predecessor was removed, so that nothing predicts it. Synchronises."""
    if labels is None:
        return
    alive = batch.over_input().to(labels.device)
    if bool(((labels[:, 1:] != -100) & ~alive[:, :-1]).any()):
        raise UnsupportedCall(
            "a label follows a removed token, so nothing predicts it; set labels of padding and of whatever follows a "
            "visual token to -100"
        )
