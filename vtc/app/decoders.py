"""Where the frames of a clip come from: PyAV for films, Pillow for animated pictures.

Both know when every frame is shown before any pixel is kept, and then decode the frames that were chosen. Times are the
file's own time stamps, so that frames of varying length stand where they are seen.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vtc.app.images import open_image, pillow_defaults
from vtc.errors import InputError

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
UNTIMED = 100  # milliseconds a picture without a duration is shown, as in browsers
DECLARED = ("mov", "matroska")  # containers whose header says how long the whole recording is


class Source(Protocol):
    """Frames of one file: seconds [T] at which each is first shown, counted from the first, and the whole duration."""

    seconds: NDArray[np.float64]
    duration: float

    def frames(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The frames of these ascending numbers, upright, [H, W, 3] each."""


class Animation:
    """A GIF, WebP, APNG or AVIF picture with several frames."""

    def __init__(self, file: Path) -> None:
        """Raises UnidentifiedImageError if the file is no such picture, InputError if it stands still."""
        self.file = file
        shown = []
        with pillow_defaults(), Image.open(file, formats=ANIMATED) as image:
            if getattr(image, "n_frames", 1) < 2:
                raise InputError(f"video {str(file)!r} is a picture that stands still; give it with --image")
            for number in range(image.n_frames):  # type: ignore[attr-defined]
                image.seek(number)
                image.load()
                shown.append(image.info.get("duration") or UNTIMED)
        ends = np.cumsum(shown) / 1000
        self.seconds, self.duration = ends - np.asarray(shown) / 1000, float(ends[-1])

    def frames(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """See `Source`."""
        found = []
        with pillow_defaults(), Image.open(self.file, formats=ANIMATED) as image:
            for number in indices:
                image.seek(number)
                found.append(np.asarray(open_image(image.copy())))
        return found


class Film:
    """Anything FFmpeg reads that has a picture track.

    Frames are found by seeking to the key frame before them. Where packets carry no presentation stamps (AVI), or none
    at all (raw streams), the file is decoded from its start and frames are counted. Frames without any time stamp are
    taken to be evenly spaced at the rate that the file declares.
    """

    def __init__(self, file: Path, threads: int = 1) -> None:
        """Raises InputError for a file without frames or with some missing, and what PyAV raises for a broken one."""
        self.file, self.threads = file, threads
        with self._open() as (container, stream):
            shown, sent, self.keys, last = self._packets(container, stream)
            rate, base, declared = stream.average_rate or stream.guessed_rate, stream.time_base, stream.duration
        self.seekable = bool(self.keys) and _distinct(shown)
        self.stamps: list[int] = []
        if self.seekable:  # what stands before the first key frame cannot be decoded
            self.stamps = sorted(stamp for stamp in shown if stamp >= self.keys[0])
        elif _distinct(sent):
            self.stamps = sorted(sent)
        if self.stamps:
            times = [float((stamp - self.stamps[0]) * base) for stamp in self.stamps]
            length = float(max(self.stamps[-1] - self.stamps[0] + last, declared or 0) * base)
        else:
            times, length = [number / float(rate or 25) for number, _ in enumerate(self._all())], 0.0
        step = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / float(rate or 25)
        self.seconds, self.duration = np.asarray(times), length if length > times[-1] else times[-1] + step

    def _packets(self, container: Any, stream: Any) -> tuple[list[Any], list[Any], list[int], int]:
        """Presentation and decoding stamps of all packets, those of key frames, and the last packet's length.

        Nothing is decoded. Raises InputError if there are none, or if the tracks end long before the header says.
        """
        shown, sent, keys, last, end = list[Any](), list[Any](), list[int](), 0, 0.0
        for packet in container.demux():
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise InputError(f"video {str(self.file)!r} breaks off; give a whole file")
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == stream.index:
                shown.append(packet.pts)
                sent.append(packet.dts)
                last = packet.duration or 0
                if packet.is_keyframe and packet.pts is not None:
                    keys.append(packet.pts)
        if not shown:
            raise InputError(f"video {str(self.file)!r} holds no frames; give a file with at least one")
        length = (container.duration or 0) / 1e6
        if container.format.name.startswith(DECLARED) and end < 0.95 * length - 0.25:
            raise InputError(
                f"video {str(self.file)!r} breaks off after {end:.1f} of {length:.1f} s; give a whole file"
            )
        return shown, sent, sorted(keys), last

    def frames(self, indices: Sequence[int]) -> list[NDArray[np.uint8]]:
        """See `Source`."""
        if self.seekable:
            found = self._sought(indices, seek=True) or self._sought(indices, seek=False) or []
        else:
            wanted = set(indices)
            found = [_pixels(frame) for number, frame in enumerate(self._all()) if number in wanted]
        if len(found) < len(indices):
            raise InputError(f"video {str(self.file)!r} breaks off while frames are decoded; give a whole file")
        return found

    def _sought(self, indices: Sequence[int], *, seek: bool) -> list[NDArray[np.uint8]] | None:
        """The frames that bear the stamps of their packets; None if one does not come up where it should."""
        found = []
        with self._open() as (container, stream):
            position, decoder = self.stamps[0] - 1, container.decode(stream)
            for target in (self.stamps[number] for number in indices):
                key = self.keys[bisect.bisect_right(self.keys, target) - 1]
                if seek and key > max(position, self.keys[0]):
                    container.seek(key, stream=stream)
                    decoder = container.decode(stream)
                frame = next((frame for frame in decoder if frame.pts is not None and frame.pts >= target), None)
                if frame is None or frame.pts != target:
                    return None
                position = frame.pts
                found.append(_pixels(frame))
        return found

    def _all(self) -> Iterator[Any]:
        with self._open() as (container, stream):
            yield from container.decode(stream)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """The container and its picture track."""
        import av

        with av.open(str(self.file)) as container:
            cover = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & cover), None)
            if stream is None:
                kinds = ", ".join(sorted({str(stream.type) for stream in container.streams})) or "no track"
                raise InputError(f"video {str(self.file)!r} has no picture track but {kinds}; give a film")
            if container.format.name.endswith("_pipe"):
                raise InputError(f"video {str(self.file)!r} is a picture that stands still; give it with --image")
            if stream.codec_context is None:
                raise InputError(
                    f"video {str(self.file)!r} has a codec that PyAV cannot decode; give H.264, VP9 or AV1"
                )
            stream.codec_context.thread_count = self.threads
            yield container, stream


def _distinct(stamps: Sequence[Any]) -> bool:
    return None not in stamps and len(set(stamps)) == len(stamps)


def _pixels(frame: Any) -> NDArray[np.uint8]:
    """RGB of a decoded frame, turned as the file's display matrix says (degrees, counterclockwise)."""
    if frame.is_corrupt:
        raise ValueError("a frame is corrupt")
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90) % 4)


def open_clip(file: Path, threads: int = 1) -> Source:
    """The source that reads `file`."""
    try:
        return Animation(file)
    except UnidentifiedImageError:
        return Film(file, threads)
