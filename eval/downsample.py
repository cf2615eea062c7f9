"""The control `downsample`: smaller pictures in front of the untouched model, at a method's number of visual tokens.

A compression method has to beat it, since it needs no method at all (VTC-Bench, arXiv 2510.07143). VTC-Bench divides
width and height by whole numbers; here the scale is what the budget asks for, and tokens are those that the processor
really makes, since processors enlarge small pictures again. It works before the processor and is therefore no
compressor but a cell of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vtc import adapters
from vtc.app.loading import Loaded
from vtc.app.media import LIST_RATE, Video
from vtc.app.preparation import Chat, prepare
from vtc.app.video_reading import scaled, scaled_size
from vtc.errors import BudgetError
from vtc.method.budget import Budget
from vtc.method.layout import Kind

DOWNSAMPLE = "downsample"
STEPS = 12
"""Halvings of the interval of scales: the side of a picture is found to within 1/4096 of its length."""
LEAST = 48 * 48
"""Pixels of the smallest picture that is tried."""


class Downsampler:
    """Scales the media of conversations for one model until their visual tokens meet a budget."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._tokens = lru_cache(4096)(self._counted)

    def check(self, chat: Chat, budget: Budget) -> None:
        """Refuse a budget that the pictures of a conversation cannot meet, however small they are.

        Raises:
            BudgetError: the model gives every picture so many tokens, or at least so many.
        """
        for before, after in zip(self._counts(chat), self._counts(self.smaller(chat, budget)), strict=True):
            if after > (allowed := budget.tokens(before)):
                raise BudgetError(
                    f"{DOWNSAMPLE} at {allowed} tokens: model {self.loaded.name!r} makes at least {after} of a picture "
                    f"such as that of {chat.source}, however small; take 'pool' as the control, or a larger budget"
                )

    def smaller(self, chat: Chat, budget: Budget) -> Chat:
        """The conversation with each picture and video scaled down, in proportion, as little as the budget allows.

        Where even the smallest has more tokens than that, it is scaled to the fewest there are.
        """
        messages = [{**message, "content": self._content(message["content"], budget)} for message in chat]
        return Chat(messages, chat.source)

    def _counts(self, chat: Chat) -> list[int]:
        """Visual tokens of each picture and video."""
        parts = [part for message in chat if not isinstance(message["content"], str) for part in message["content"]]
        return [self._tokens(*shape) for part in parts if (shape := _shape(part))]

    def _content(self, content: Any, budget: Budget) -> Any:
        return content if isinstance(content, str) else [self._part(part, budget) for part in content]

    def _part(self, part: Mapping[str, Any], budget: Budget) -> Mapping[str, Any]:
        shape = _shape(part)
        if shape is None:
            return part
        kind, width, height, frames = shape
        size = self._size(kind, width, height, frames, budget)
        if size == (width, height):
            return part
        media = part[kind]
        if kind == "video":
            return {**part, kind: scaled(media, size[0] * size[1])}
        return {**part, kind: media.resize(size, Image.Resampling.BICUBIC)}

    def _size(self, kind: Kind, width: int, height: int, frames: int, budget: Budget) -> tuple[int, int]:
        """The largest size found whose tokens meet the budget, or else are the fewest."""
        tokens = self._tokens(kind, width, height, frames)
        allowed = max(budget.tokens(tokens), self._tokens(kind, *scaled_size(width, height, LEAST), frames))
        if tokens <= allowed:
            return width, height
        low, high, best = 0.0, 1.0, scaled_size(width, height, LEAST)
        for _ in range(STEPS):
            middle = (low + high) / 2
            size = scaled_size(width, height, width * height * middle**2)
            if self._tokens(kind, *size, frames) <= allowed:
                low, best = middle, size
            else:
                high = middle
        return best

    def _counted(self, kind: Kind, width: int, height: int, frames: int) -> int:
        """Visual tokens of a blank picture, or of `frames` blank frames, of this size."""
        blank = np.zeros((height, width, 3), np.uint8)
        if kind == "video":
            media: Any = Video(np.stack([blank] * frames), np.arange(frames) / LIST_RATE, LIST_RATE, frames)
        else:
            media = Image.fromarray(blank)
        inputs, _ = prepare(self.loaded, [[{"role": "user", "content": [{"type": kind, kind: media}]}]])
        return int((inputs["input_ids"] == adapters.of(self.loaded.model).placeholders[kind]).sum())


def _shape(part: Mapping[str, Any]) -> tuple[Kind, int, int, int] | None:
    """Kind, width, height and number of frames of a picture or video; None for text."""
    kind = part["type"]
    if kind == "image":
        picture: Image.Image = part[kind]
        return kind, *picture.size, 1
    if kind == "video":
        video: Video = part[kind]
        count, height, width = video.frames.shape[:3]
        return kind, width, height, count
    return None
