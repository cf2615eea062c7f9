"""Video files as arrays: one decode per video, frames chosen before decoding, by their times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vtc.app.images import SCHEMES
from vtc.errors import InputError, one_line, unknown_name

Sampling = Literal["uniform", "fps", "all"]
LIST_RATE = 24.0
"""Frames per second of a list of frames, which comes without times: what transformers' video processors assume."""


@dataclass(frozen=True, eq=False)
class Video:
    """Frames [T, H, W, 3] uint8 of one file and when each is shown, in seconds from the first frame of the file.

    fps: the file's mean rate, `total` frames over its duration. name: the file, for messages.
    """

    frames: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    fps: float
    total: int
    name: str = ""

    def metadata(self) -> dict[str, object]:
        """What video processors of transformers take as `video_metadata`.

        They compute times as `frames_indices / fps`. Hence the indices count mean frame lengths, not frames: whole
        numbers for a constant rate, fractions otherwise, and always the frames' true times.
        """
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "frames_indices": np.round(self.seconds * self.fps, 6).tolist(),
            "video_backend": "pyav",
        }


def frame_indices(
    total: int,
    rate: float,
    sampling: Sampling = "uniform",
    *,
    frames: int = 8,
    fps: float = 1.0,
    seconds: NDArray[np.float64] | None = None,
) -> list[int]:
    """Which of `total` frames to read, ascending and each once; `rate` is the recording's mean rate per second.

    seconds: when each frame is shown, [total]; without them, frames lie evenly. "uniform": `frames` of them, evenly
    numbered from the first to the last (all, if there are fewer). "fps": those nearest in time to `fps` points per
    second of the recording, or if these are more than `frames`, uniformly `frames`. "all": every frame. Raises
    InputError for bad settings.

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
        wanted = max(1, math.ceil(total / rate * fps - 1e-6))
        if wanted <= frames:
            shown = np.arange(total) / rate if seconds is None else seconds
            nearest = np.interp(np.arange(wanted) / fps, shown, np.arange(total))
            return [int(number) for number in np.unique(np.rint(nearest.round(6)))]
    count = min(frames, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def read_video(
    path: str | Path,
    sampling: Sampling = "uniform",
    *,
    frames: int = 8,
    fps: float = 1.0,
    start: float | None = None,
    end: float | None = None,
    threads: int = 1,
) -> Video:
    """Decode the chosen frames of a video file or an animated picture; see `frame_indices` for the choice.

    start, end: choose among the frames shown in [start, end] seconds alone; times stay those of the file. threads: of
    the decoder. Raises InputError for a missing, broken or empty file, and for a part in which no frame is shown.
    """
    from vtc.app.decoders import open_clip  # PyAV comes with the extra `eval`; everything else works without it

    file, name = Path(path), f"video {str(path)!r}"
    if str(path).lower().startswith(SCHEMES):
        raise InputError(f"{name} is a URL; download it and give the file")
    if file.is_dir():
        raise InputError(f"{name} is a folder; give the path of one video file, and repeat --video for several")
    if not file.is_file():
        raise InputError(f"{name} does not exist; give the path of a video file")
    frame_indices(1, 1.0, sampling, frames=frames, fps=fps)
    try:
        source = open_clip(file, threads)
        total = len(source.seconds)
        rate = total / source.duration
        first, last = _part(source.seconds, source.duration, start, end, name)
        shown = source.seconds[first:last]
        chosen = frame_indices(last - first, rate, sampling, frames=frames, fps=fps, seconds=shown - shown[0])
        indices = [first + index for index in chosen]
        pixels = source.frames(indices)
    except (InputError, ImportError):
        raise
    except Exception as error:  # decoders raise whatever their formats break
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{name} cannot be read ({reason}); give a whole MP4, MKV, WebM or GIF file") from error
    sizes = {frame.shape for frame in pixels}
    if len(sizes) > 1:
        raise InputError(f"{name} changes its picture size on the way; give a video of one size")
    return Video(np.stack(pixels), source.seconds[indices], rate, total, str(path))


def _part(
    seconds: NDArray[np.float64], duration: float, start: float | None, end: float | None, name: str
) -> tuple[int, int]:
    """Numbers of the first frame shown in [start, end] and of the one behind the last; a frame is shown until the next.

    Raises InputError if there is none.
    """
    begin, stop = start or 0.0, duration if end is None else end
    first = max(0, int(np.searchsorted(seconds, begin, side="right")) - 1)
    last = int(np.searchsorted(seconds, stop, side="right"))
    if last <= first or begin >= duration:
        raise InputError(f"{name} shows nothing from {begin:g} to {stop:g} s; it lasts {duration:.1f} s")
    return first, last
