"""Which images of a prompt are the frames of one video, where only the text between them tells."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vtc.errors import VTCError

FrameText = Callable[[int], Sequence[int]]
"""Number k of a frame, from 2 on -> the ids that its processor writes between frame k - 1 and frame k."""

DIGITS = 4
"""Ids that a number in front of an image may take, at most."""


class Run(NamedTuple):
    """An unbroken run of placeholders: its first place and its length."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The place behind it."""
        return self.start + self.length


def runs(row: Sequence[bool]) -> list[Run]:
    """The unbroken runs of True.

    >>> runs([True, False, True, True])
    [Run(start=0, length=1), Run(start=2, length=2)]
    """
    edges = [0, *(place for place in range(1, len(row)) if row[place] != row[place - 1]), len(row)]
    return [Run(start, end - start) for start, end in itertools.pairwise(edges) if end > start and row[start]]


def frame_text(processor: Any) -> FrameText:
    """What an InternVL processor writes between two frames: the end of an image, a numbered line, the next image.

    Raises VTCError for anything that is no InternVL processor.
    """
    try:
        tokenizer, start, end = processor.tokenizer, processor.start_image_token_id, processor.end_image_token_id
    except AttributeError as error:
        raise VTCError(
            f"processor={type(processor).__name__} is no processor of InternVL ({error}); pass what "
            "AutoProcessor.from_pretrained gives for the checkpoint"
        ) from None

    @functools.cache
    def between(number: int) -> tuple[int, ...]:
        return (end, *tokenizer(f"\nFrame{number}: ", add_special_tokens=False)["input_ids"], start)

    return between


def listed(texts: Sequence[Sequence[int]]) -> FrameText:
    """The same from a list, whose first entry stands before frame 2."""
    return lambda number: tuple(texts[number - 2]) if number - 2 < len(texts) else ()


def group(ids: Sequence[int], images: Sequence[Run], tile: int, text: FrameText) -> list[int]:
    """How many of a prompt's runs each item is made of: frames, in the order in which they are counted, or one.

    ids: the prompt. images: its runs of placeholders. tile: length of a run that can be a frame.
    """
    counts: list[int] = []
    for before, run in zip([None, *images], images, strict=False):
        follows = before is not None and before.length == run.length == tile
        if before is not None and follows and tuple(ids[before.end : run.start]) == tuple(text(counts[-1] + 1)):
            counts[-1] += 1
        else:
            counts.append(1)
    return counts


def numbered(ids: Sequence[int], images: Sequence[Run], tile: int) -> bool:
    """True where two neighbouring runs of one tile follow texts that differ in a number, or whatever stands for it."""
    ends = [0, *(run.end for run in images)]
    texts = [list(ids[end : run.start]) for end, run in zip(ends, images, strict=False)]
    pairs = zip(images, images[1:], texts, texts[1:], strict=False)
    return any(one.length == two.length == tile and _counts_on(*between) for one, two, *between in pairs)


def _counts_on(before: Sequence[int], after: Sequence[int]) -> bool:
    """True for two texts that end alike but for a few ids in the middle, as 'Frame1: ' and 'Frame2: ' do."""
    shortest = min(len(before), len(after))
    tail = next((n for n in range(shortest) if before[-1 - n] != after[-1 - n]), shortest)
    if tail < 2 or tail == shortest:
        return False
    ends = before[max(0, len(before) - tail - DIGITS - 1) : len(before) - tail - 1]
    others = after[max(0, len(after) - tail - DIGITS - 1) : len(after) - tail - 1]
    return bool(set(ends) & set(others))
