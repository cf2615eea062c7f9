"""Images and video files as arrays: one decode per video, frames chosen before decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vtc.errors import InputError, unknown_name

Sampling = Literal["uniform", "fps", "all"]


@dataclass(frozen=True, eq=False)
class Video:
    """Frames [T, H, W, 3] uint8 of one file, their places in seconds, and the file's own rate and number of frames."""

    frames: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    fps: float
    total: int

    def metadata(self) -> dict[str, object]:
        """What video processors of transformers take as `video_metadata`."""
        indices = np.rint(self.seconds * self.fps).astype(int).tolist()
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "frames_indices": indices,
            "video_backend": "decord",
        }


def frame_indices(
    total: int, rate: float, sampling: Sampling = "uniform", *, frames: int = 8, fps: float = 1.0
) -> list[int]:
    """Which of `total` frames recorded at `rate` frames per second to read, ascending.

    "uniform": `frames` of them, evenly from the first to the last (all, if there are fewer). "fps": `fps` per second of
    the recording, at most `frames`, which then lie evenly. "all": every frame. Raises InputError for bad settings.

    >>> frame_indices(100, 25.0, frames=4), frame_indices(100, 25.0, "fps", fps=2.0, frames=64)
    ([0, 33, 66, 99], [0, 12, 25, 38, 50, 62, 75, 88])
    """
    if sampling not in get_args(Sampling):
        raise InputError(str(unknown_name("sampling", sampling, get_args(Sampling))))
    if frames < 1 or fps <= 0:
        raise InputError(f"frames={frames} and fps={fps} choose nothing; give at least one frame and a positive rate")
    if sampling == "all":
        return list(range(total))
    if sampling == "fps":
        wanted = max(1, math.ceil(total / rate * fps))
        if wanted <= frames:
            return [min(total - 1, round(i * rate / fps)) for i in range(wanted)] if fps < rate else list(range(total))
    count = min(frames, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def read_video(
    path: str | Path, sampling: Sampling = "uniform", *, frames: int = 8, fps: float = 1.0, threads: int = 1
) -> Video:
    """Decode the chosen frames of a video file; see `frame_indices` for the choice.

    Raises InputError for a missing, broken or empty file.
    """
    import decord

    file = Path(path)
    if not file.is_file():
        raise InputError(f"video {str(path)!r} does not exist; give the path of a video file")
    try:
        reader = decord.VideoReader(str(file), num_threads=threads)
        total, rate = len(reader), float(reader.get_avg_fps())
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise InputError(f"video {str(path)!r} cannot be read ({reason}); give an MP4, MKV or WebM file") from error
    if total == 0 or not rate > 0:
        raise InputError(f"video {str(path)!r} holds no frames; give a file with at least one")
    indices = frame_indices(total, rate, sampling, frames=frames, fps=fps)
    try:
        pixels = reader.get_batch(indices).asnumpy()
    except Exception as error:
        raise InputError(f"video {str(path)!r} breaks off while frames are decoded; give a whole file") from error
    return Video(pixels, np.asarray(indices) / rate, rate, total)
