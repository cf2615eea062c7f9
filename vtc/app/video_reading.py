"""How a sweep turns videos into frames: files and lists of frames, by one set of rules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtc.app.images import open_image
from vtc.app.media import LIST_RATE, Sampling, Video, frame_indices, read_video
from vtc.errors import InputError

FRAMES = 32
"""Frames of a file where nobody says how many."""


def frame_list(frames: Iterable[Any], name: str = "") -> Video:
    """A clip of single frames: pictures, arrays [H, W, 3], or anything else that `open_image` takes; `LIST_RATE` apart.

    Raises InputError for no frames, for one that cannot be read, and for frames of several sizes.
    """
    opened = [open_image(Image.fromarray(each) if isinstance(each, np.ndarray) else each) for each in frames]
    sizes = sorted({picture.size for picture in opened})
    if len(sizes) != 1:
        shapes = ", ".join(f"{width} x {height}" for width, height in sizes)
        given = f"frames of {shapes} pixels" if sizes else "no frames"
        raise InputError(f"a list of {given} is no video; give frames of one size, at least one")
    pixels = np.stack([np.asarray(picture) for picture in opened])
    return Video(pixels, np.arange(len(pixels)) / LIST_RATE, LIST_RATE, len(pixels), name)


@dataclass(frozen=True)
class VideoReading:
    """How the videos of a sweep become frames.

    frames: at most so many of each; None is `FRAMES` of a file and all of a list. fps: frames per second of recording.
    sampling: as in `frame_indices`; None is "fps" where `fps` is given, else "uniform". max_pixels: larger frames are
    scaled down to so many pixels. Raises InputError for numbers that choose nothing.

    >>> VideoReading(frames=16).settings()
    {'frames': 16}
    """

    frames: int | None = None
    fps: float | None = None
    sampling: Sampling | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        frame_indices(1, 1.0, self.rule, frames=self._frames(1), fps=self._fps())
        if self.rule == "fps" and self.fps is None:
            raise InputError('sampling "fps" needs a rate; add for example fps: 1')
        if self.rule != "fps" and self.fps is not None:
            raise InputError(f"fps={self.fps:g} has no meaning with sampling {self.rule!r}; leave one of the two out")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise InputError(f"max_pixels={self.max_pixels} leaves nothing; write for example 200704 (448 x 448)")

    @property
    def rule(self) -> Sampling:
        """The sampling that applies."""
        return self.sampling or ("uniform" if self.fps is None else "fps")

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def read(self, source: Any, start: float | None = None, end: float | None = None) -> Video:
        """The clip of a file, between `start` and `end` seconds of it, or of a list of frames, whole under `fps`.

        Raises:
            InputError: it cannot be read, or a part of a list is asked for.
        """
        if isinstance(source, str | Path):
            reading = {"frames": self._frames(FRAMES), "fps": self._fps()}
            video = read_video(source, self.rule, start=start, end=end, **reading)  # type: ignore[arg-type]
        elif start is not None or end is not None:
            raise InputError("a list of frames has no times to take a part by; give the frames of the part")
        elif isinstance(source, list | tuple | np.ndarray):
            video = frame_list(source)
            count = len(video.frames)
            rule = "all" if self.rule == "fps" else self.rule
            indices = frame_indices(count, LIST_RATE, rule, frames=self._frames(count))
            video = replace(video, frames=video.frames[indices], seconds=video.seconds[indices])
        else:
            raise InputError(f"a video cannot be of type {type(source).__name__}; give a file or a list of frames")
        return video if self.max_pixels is None else scaled(video, self.max_pixels)

    def _frames(self, default: int) -> int:
        return default if self.frames is None else self.frames

    def _fps(self) -> float:
        return 1.0 if self.fps is None else self.fps


def scaled(video: Video, pixels: int) -> Video:
    """The clip with frames of at most `pixels` pixels, of the same shape as far as whole pixels allow; bicubic."""
    height, width = video.frames.shape[1:3]
    size = scaled_size(width, height, pixels)
    if size == (width, height):
        return video
    frames = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in video.frames]
    return replace(video, frames=np.stack(frames))


def scaled_size(width: int, height: int, pixels: float) -> tuple[int, int]:
    """Width and height of at most `pixels` pixels, in the proportion given; as given if it is small enough.

    >>> scaled_size(640, 480, 10_000), scaled_size(30, 20, 10_000)
    ((115, 86), (30, 20))
    """
    if width * height <= pixels:
        return width, height
    factor = math.sqrt(pixels / (width * height))
    return max(1, int(width * factor)), max(1, int(height * factor))
