"""Which rows of a call are the prompt, and which of its text is the user's: all that a method may look at.

What was generated, drafted or is a label never counts. Its end is known from labels, from what generate() was called
with, and from what the caller says; without any of these the whole input is the prompt. The system prompt in front of
the question is told by its length, or ends with the last control token before the first visual token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, UnsupportedCall, shown
from vtc.ops.host import put

Lengths = int | Sequence[int] | Tensor
"""Tokens of every row, padding not counted: one number for all rows, or one for each prompt of the batch."""
Sizes = Sequence[tuple[int, int]] | Tensor
"""Height and width in pixels of every picture of a call, in the order of the prompts."""

Questions = str | Sequence[str]
"""The text of each prompt of a batch, or one text for all of them."""


@dataclass(frozen=True)
class Bounds:
    """What the caller says about a call; None where nothing is said.

    prompt_length: tokens from the first one on that are the prompt. system_length: tokens from the first one on that
    are the system prompt, with whatever the chat template writes in front of the user's words. image_sizes: height and
    width in pixels of every picture that the processor was given, in the order of the prompts. questions: the text of
    each prompt, for methods that encode it anew.
    """

    prompt_length: Lengths | None = None
    system_length: Lengths | None = None
    image_sizes: tuple[tuple[int, int], ...] | None = None
    questions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("prompt_length", 1), ("system_length", 0)):
            object.__setattr__(self, name, _checked(name, getattr(self, name), least))


def pixel_sizes(given: Sizes | None) -> tuple[tuple[int, int], ...] | None:
    """Sizes as Python numbers. Raises InputError for anything else."""
    if given is None:
        return None
    values = given.tolist() if isinstance(given, Tensor) else given
    with contextlib.suppress(TypeError, ValueError):
        pairs = tuple((height, width) for height, width in values)
        if all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for pair in pairs for side in pair):
            return pairs
    raise InputError(
        f"image_sizes={shown(given)} are no sizes of pictures; pass (height, width) in pixels of each, for example "
        "image_sizes=[(480, 640)]"
    )


def texts(given: Questions | None) -> tuple[str, ...] | None:
    """Questions as a tuple; a single one stands for all prompts. Raises InputError for anything else."""
    if given is None:
        return None
    several = (given,) if isinstance(given, str) else given
    if isinstance(several, Sequence) and several and all(isinstance(each, str) for each in several):
        return tuple(several)
    raise InputError(
        f"questions={shown(given)} are no texts; pass that of each prompt of the batch, for example "
        'questions=["What color is it?"]'
    )


def _checked(name: str, given: Any, least: int) -> int | tuple[int, ...] | None:
    """The lengths as Python numbers. Raises InputError for anything else."""
    if given is None:
        return None
    try:
        values = given.tolist() if hasattr(given, "tolist") else given
        several = list(values) if isinstance(values, list | tuple) else [values]
        if several and all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in several):
            return tuple(several) if isinstance(values, list | tuple) else several[0]
    except TypeError:
        pass
    raise InputError(
        f"{name}={shown(given)} is no number of tokens; pass a whole number from {least} on, or one for each prompt of "
        f"the batch, for example {name}=[17, 23]"
    )


def per_row(name: str, lengths: Lengths | None, batch: int, device: torch.device) -> Tensor | None:
    """[batch, 1] `lengths`, each repeated where beams repeat its prompt; None if none are given.

    Raises UnsupportedCall for another number of rows.
    """
    if lengths is None:
        return None
    values = put([lengths] if isinstance(lengths, int) else list(lengths), device)
    if batch % len(values):
        raise UnsupportedCall(
            f"{name} has {len(values)} entries for a batch of {batch} rows; give one number for all rows, or one for "
            "each prompt"
        )
    return values.repeat_interleave(batch // len(values))[:, None]


@dataclass(frozen=True, eq=False)
class Prompt:
    """[B, S] bool each. valid: no padding. rows: the prompt. text: what in it is neither visual nor system prompt."""

    valid: Tensor
    rows: Tensor
    text: Tensor

    @classmethod
    def find(
        cls,
        visual: Tensor,
        control: Tensor | None,
        mask: Tensor | None,
        labels: Tensor | None,
        limit: int | None,
        bounds: Bounds,
    ) -> Prompt:
        """Find the prompt in a chunk of S columns.

        visual: [B, S] bool. control: [B, S] bool, tokens that begin a sequence or end a turn. mask: [B, past + S]
        attention mask. labels: [B, S], -100 where a token is no answer. limit: columns that generate() was given.
        """
        (batch, length), device = visual.shape, visual.device
        valid = torch.ones_like(visual) if mask is None else mask[:, -length:].to(device).bool()
        rows, number = valid, valid.cumsum(1)
        if limit is not None and limit < length:
            rows = rows & (torch.arange(length, device=device) < limit)
        if (ends := per_row("prompt_length", bounds.prompt_length, batch, device)) is not None:
            rows = rows & (number <= ends)
        if labels is not None:
            rows = rows & unanswered(visual, labels.to(device) != -100)
        text = rows & ~visual
        if (system := per_row("system_length", bounds.system_length, batch, device)) is not None:
            text = text & (number > system)
        elif control is not None:
            text = text & ~system_rows(visual, control)
        return cls(valid, rows, text)


def unanswered(visual: Tensor, answer: Tensor) -> Tensor:
    """[B, S] bool, what lies in front of the first answer behind a row's last visual token, without earlier answers."""
    columns = torch.arange(visual.shape[1], device=visual.device)
    behind = columns > (columns * visual).amax(1, keepdim=True)
    return ~answer & ((answer & behind).cumsum(1) == 0)


def system_rows(visual: Tensor, control: Tensor) -> Tensor:
    """[B, S] bool, all up to the last control token in front of a row's first visual token; nothing in other rows."""
    ahead = control & (visual.cumsum(1) == 0) & visual.any(1, keepdim=True)
    return ahead.flip(1).cumsum(1).flip(1) > 0
