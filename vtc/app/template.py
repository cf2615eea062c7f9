"""What a chat template writes in front of the user's words, and whether it begins the sequence itself."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def system_length(processor: Any, conversation: Sequence[Mapping[str, Any]] = ()) -> int:
    """Tokens that the chat template writes in front of the user's first words, system messages included.

    conversation: messages as `processor.apply_chat_template` takes them; only leading system messages matter. 0 for a
    processor without a template. It is what two prompts with different questions have in common at their beginning.
    """
    if not getattr(processor, "chat_template", None):
        return 0
    first = _told(conversation)
    tokenizer = getattr(processor, "tokenizer", processor)
    ids: list[list[int]] = []
    for word in ("one", "Two"):
        chat = [*first, {"role": "user", "content": [{"type": "text", "text": word}]}]
        text = processor.apply_chat_template(chat, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=not begins_itself(tokenizer, text))["input_ids"])
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids, strict=False)))


def system_lengths(processor: Any, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[int, ...]:
    """`system_length` of each; a template writes in front of equal system messages once."""
    known: list[tuple[list[Mapping[str, Any]], int]] = []
    found = []
    for conversation in conversations:
        first = _told(conversation)
        length = next((length for told, length in known if told == first), None)
        if length is None:
            length = system_length(processor, first)
            known.append((first, length))
        found.append(length)
    return tuple(found)


def _told(conversation: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The leading system messages."""
    return list(itertools.takewhile(lambda message: message["role"] == "system", conversation))


def begins_itself(tokenizer: Any, text: str) -> bool:
    """True where a chat template wrote the token that begins a sequence, so that the tokenizer must not add another."""
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
