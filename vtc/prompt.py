"""Which rows of a call are the prompt, and which of its text is the user's: all that a method may look at.

What was generated, drafted or is a label never counts. Its end is known from labels, from what generate() was called
with, and from what the caller says; without any of these the whole input is the prompt. The system prompt in front of
the question is told by its length, or ends with the last control token before the first visual token.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtc.errors import InputError, UnsupportedCall, shown
from vtc.installed import MethodWrapper

Lengths = int | Sequence[int] | Tensor
"""Tokens of every row, padding not counted: one number for all rows, or one for each prompt of the batch."""


@dataclass(frozen=True)
class Bounds:
    """What the caller says about the rows of a call; None where nothing is said.

    prompt_length: tokens from the first one on that are the prompt. system_length: tokens from the first one on that
    are the system prompt, with whatever the chat template writes in front of the user's words.
    """

    prompt_length: Lengths | None = None
    system_length: Lengths | None = None

    def __post_init__(self) -> None:
        for name, least in (("prompt_length", 1), ("system_length", 0)):
            object.__setattr__(self, name, _checked(name, getattr(self, name), least))


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
    values = torch.tensor([lengths] if isinstance(lengths, int) else list(lengths), device=device)
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


def control_tokens(model: Any) -> tuple[int, ...]:
    """Ids that begin a sequence or end a turn, from the configurations of a model."""
    config = model.config.get_text_config()
    found: dict[int, None] = {}
    for source in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            ids = getattr(source, name, None)
            for token in [ids] if isinstance(ids, int) else ids or ():
                found[token] = None
    return tuple(found)


class GenerateWatch:
    """Notes, per thread, what generate() of one model was given, so that drafts and answers are told from the prompt.

    Inside a nested call (a model that drafts for itself) the outer call's prompt counts.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state = threading.local()
        self._wrapper: MethodWrapper | None = None

    def install(self) -> None:
        """Wrap generate() on the instance; models without one are left alone."""
        function = getattr(self._model, "generate", None)
        if function is not None:
            self._wrapper = MethodWrapper(self._model, "generate", self._noting(function))

    def remove(self) -> None:
        """Restore the instance."""
        if self._wrapper is not None:
            self._wrapper.remove()

    def limit(self, seen: int) -> int | None:
        """Columns of the coming chunk that are prompt, behind `seen` cached tokens; None outside generate()."""
        noted: tuple[int, bool] | None = getattr(self._state, "noted", None)
        if noted is None:
            return None
        length, whole = noted
        return max(0, length - seen) if whole else length

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        state = self._state

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(state, "noted", None)
            state.noted = outer if outer is not None else _given(*args[:1], **kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                state.noted = outer

        return generate


def _given(
    inputs: Any = None, *, input_ids: Any = None, inputs_embeds: Any = None, **_: Any
) -> tuple[int, bool] | None:
    """Columns that generate() was given, and whether they begin with what its cache has seen already."""
    for value, whole in ((inputs_embeds, False), (inputs, True), (input_ids, True)):
        if isinstance(value, Tensor):
            return value.shape[1], whole
    return None


def system_length(processor: Any, conversation: Sequence[Mapping[str, Any]] = ()) -> int:
    """Tokens that the chat template writes in front of the user's first words, system messages included.

    conversation: messages as `processor.apply_chat_template` takes them; only leading system messages matter. 0 for a
    processor without a template. It is what two prompts with different questions have in common at their beginning.
    """
    if not getattr(processor, "chat_template", None):
        return 0
    first = list(itertools.takewhile(lambda message: message["role"] == "system", conversation))
    tokenizer = getattr(processor, "tokenizer", processor)
    ids: list[list[int]] = []
    for word in ("one", "Two"):
        chat = [*first, {"role": "user", "content": [{"type": "text", "text": word}]}]
        text = processor.apply_chat_template(chat, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=not begins_itself(tokenizer, text))["input_ids"])
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))


def begins_itself(tokenizer: Any, text: str) -> bool:
    """True where a chat template wrote the token that begins a sequence, so that the tokenizer must not add another."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
