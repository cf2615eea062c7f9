"""Video files: which frames are read, and what broken files say."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageFile

from vtc.app import decoders
from vtc.app.media import Video, frame_indices, read_video
from vtc.errors import InputError

FRAMES, RATE = 30, 10
UNEVEN = [*range(0, 500, 100), *range(1000, 4000, 1000), 3010, 3020, *range(4000, 5000, 50)]  # milliseconds


def write(file: Path, codec: str = "mpeg4", times: Sequence[int] = range(0, 100 * FRAMES, 100), **options: Any) -> Path:
    """A clip whose frame i has the grey value 8 i and is shown at `times[i]` milliseconds; options of the encoder."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options.pop("options", {}))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for name, value in ({"time_base": Fraction(1, 1000)} | options).items():
            setattr(stream.codec_context, name, value)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * number, np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def numbers(video: Video) -> list[int]:
    """Which frames these are, by their grey; the codec rounds."""
    return np.rint(video.frames.reshape(len(video.frames), -1).mean(1) / 8).astype(int).tolist()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-second clip whose frame i has the grey value 8 i."""
    return write(tmp_path_factory.mktemp("clips") / "ramp.mp4", time_base=Fraction(1, RATE))


def test_uniform_frames_are_the_right_ones(clip: Path) -> None:
    video = read_video(clip, frames=4)
    assert video.frames.shape == (4, 48, 64, 3)
    assert video.total == FRAMES
    assert video.fps == pytest.approx(RATE)
    grey = video.frames.reshape(4, -1).mean(1)
    assert np.abs(grey - 8 * np.array([0, 10, 19, 29])).max() < 6  # the codec's rounding
    assert np.allclose(video.seconds, [0, 1.0, 1.9, 2.9])
    assert video.metadata()["frames_indices"] == [0, 10, 19, 29]


def test_sampling_by_rate_and_all(clip: Path) -> None:
    assert read_video(clip, "fps", fps=2.0, frames=64).seconds.tolist() == [0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert len(read_video(clip, "fps", fps=2.0, frames=3).frames) == 3
    assert len(read_video(clip, "all").frames) == FRAMES
    assert len(read_video(clip, frames=500).frames) == FRAMES


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("frames", [1, 2, 8, 200])
@pytest.mark.parametrize("sampling", ["uniform", "fps", "all"])
def test_indices_are_ascending_unique_and_inside(total: int, frames: int, sampling: str) -> None:
    for fps in (0.3, 1.0, 24.0, 60.0):
        indices = frame_indices(total, 24.0, sampling, frames=frames, fps=fps)  # type: ignore[arg-type]
        assert indices
        assert all(0 <= i < total for i in indices)
        assert indices == sorted(set(indices))
        assert sampling == "all" or len(indices) <= frames


def test_bad_files_and_settings(tmp_path: Path, clip: Path) -> None:
    with pytest.raises(InputError, match=r"none\.mp4.*does not exist"):
        read_video(tmp_path / "none.mp4")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.mp4.*cannot be read"):
        read_video(empty)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:200])
    with pytest.raises(InputError, match=r"broken\.mp4.*cannot be read"):
        read_video(broken)
    with pytest.raises(InputError, match="did you mean 'uniform'"):
        read_video(clip, "uniforme")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="frames=0"):
        read_video(clip, frames=0)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("h264.mp4", "libx264", {"gop_size": 5, "max_b_frames": 2}),
        ("h264.mkv", "libx264", {"gop_size": 5, "max_b_frames": 2}),
        ("h264.ts", "libx264", {"max_b_frames": 2}),
        ("h265.mp4", "libx265", {"gop_size": 5, "options": {"x265-params": "log-level=none"}}),
        ("vp9.webm", "libvpx-vp9", {}),
        ("av1.mp4", "libaom-av1", {"gop_size": 10, "options": {"cpu-used": "8"}}),
        ("mpeg4.avi", "mpeg4", {"time_base": Fraction(1, RATE), "bit_rate": 4_000_000}),
    ],
)
def test_every_codec_and_container_gives_the_same_frames(
    tmp_path: Path, name: str, codec: str, options: dict[str, Any]
) -> None:
    file = write(tmp_path / name, codec, **options)
    for sampling, wanted in (("uniform", [0, 7, 14, 22, 29]), ("fps", [0, 5, 10, 15, 20, 25])):
        video = read_video(file, sampling, frames=5 if sampling == "uniform" else 64, fps=2.0)  # type: ignore[arg-type]
        assert numbers(video) == wanted
        assert np.allclose(video.seconds, np.array(wanted) / RATE)
        assert (video.total, video.fps) == (FRAMES, pytest.approx(RATE))


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_times_are_those_of_the_file_where_frames_last_differently(tmp_path: Path, name: str) -> None:
    video = read_video(write(tmp_path / name, "libx264", UNEVEN), "all")
    shown = np.array(UNEVEN) / 1000
    assert numbers(video) == list(range(len(UNEVEN)))
    assert np.allclose(video.seconds, shown)
    assert video.fps == pytest.approx(len(UNEVEN) / 5.05, rel=0.02)  # the last frame is shown for 0.05 s, or for 0.1
    told = video.metadata()
    assert np.allclose(np.array(told["frames_indices"]) / told["fps"], shown, atol=1e-5)
    assert told["duration"] == pytest.approx(5.05, abs=0.06)
    sampled = read_video(tmp_path / name, "fps", fps=1.0, frames=64)
    assert np.allclose(sampled.seconds, [0, 1, 2, 3, 4, 4.95])
    assert numbers(sampled) == [0, 5, 6, 7, 10, 29]


def test_the_processor_of_qwen3_writes_the_files_own_times(tmp_path: Path) -> None:
    from transformers.video_utils import VideoMetadata

    video = read_video(write(tmp_path / "uneven.mp4", "libx264", UNEVEN), frames=4)
    told = VideoMetadata(**video.metadata())  # type: ignore[arg-type]
    assert np.allclose(told.timestamps, video.seconds, atol=1e-5)
    assert told.sampled_fps == pytest.approx(4 / told.duration)


def test_times_are_counted_from_the_first_frame(tmp_path: Path) -> None:
    video = read_video(write(tmp_path / "late.mkv", "libx264", range(7000, 8000, 100)), frames=2)
    assert np.allclose(video.seconds, [0, 0.9]) and video.fps == pytest.approx(RATE)


def test_without_time_stamps_the_declared_rate_counts(tmp_path: Path) -> None:
    video = read_video(write(tmp_path / "raw.h264", "libx264"), frames=3)
    assert numbers(video) == [0, 14, 29]  # round(14.5) is even
    assert np.allclose(video.seconds, np.array([0, 14, 29]) / video.fps)


def test_a_decoder_that_loses_its_place_after_seeking_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = decoders.Film(write(tmp_path / "clip.mp4", "libx264", gop_size=5))
    tried = []
    sought = film._sought

    def lost(indices: Sequence[int], *, seek: bool) -> Any:
        tried.append(seek)
        return None if seek else sought(indices, seek=False)

    monkeypatch.setattr(film, "_sought", lost)
    assert [round(frame.mean() / 8) for frame in film.frames([3, 17])] == [3, 17]
    assert tried == [True, False]
    monkeypatch.setattr(film, "_sought", lambda indices, *, seek: None)
    with pytest.raises(InputError, match=r"clip\.mp4' breaks off while frames are decoded"):
        film.frames([3])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_pictures_are_videos_with_times_of_their_own(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGB", (64, 48), (8 * number,) * 3) for number in range(10)]
    lengths = [100] * 5 + [500] * 5
    file = tmp_path / f"moving.{suffix}"
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=lengths, lossless=True)
    video = read_video(file, "all")
    assert numbers(video) == list(range(10))
    assert np.allclose(video.seconds, np.cumsum([0, *lengths[:-1]]) / 1000)
    assert video.metadata()["duration"] == pytest.approx(3.0)
    assert numbers(read_video(file, "fps", fps=1.0, frames=8)) == [0, 6, 8]
    pictures[0].save(file)
    with pytest.raises(InputError, match=rf"moving\.{suffix}' is a picture that stands still; give it with --image"):
        read_video(file)


def test_a_broken_animation_is_refused_whatever_pillow_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(6)]
    pictures[0].save(file := tmp_path / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 12])
    for lenient in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
        with pytest.raises(InputError, match=r"moving\.gif'"):
            read_video(file)


@pytest.mark.parametrize(("turn", "quarters"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_film_is_turned_as_its_file_says(tmp_path: Path, turn: tuple[int, ...], quarters: int) -> None:
    """Phones record in one direction and write how to turn it (quarters, counterclockwise) into the track's matrix."""
    with av.open(str(file := tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:16, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 44
    a, b, c, d = (value * 65536 for value in turn)
    content[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    (frame,) = read_video(file, "all").frames
    assert np.abs(frame.astype(int) - np.rot90(pixels, quarters)).mean() < 6


def test_what_holds_no_frames_says_so(tmp_path: Path, clip: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for number in range(10):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 44100, 1024 * number
            container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match=r"sound\.mp4' has no picture track but audio"):
        read_video(tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        container.add_stream("mpeg4", rate=RATE)
        container.start_encoding()
    with pytest.raises(InputError, match=r"empty\.avi' holds no frames"):
        read_video(tmp_path / "empty.avi")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.jpg")
    with pytest.raises(InputError, match=r"still\.jpg' is a picture that stands still"):
        read_video(tmp_path / "still.jpg")
    with pytest.raises(InputError, match="is a folder"):
        read_video(tmp_path)
    with pytest.raises(InputError, match=r"'https://clips\.example/a\.mp4' is a URL; download it"):
        read_video("https://clips.example/a.mp4")
    assert read_video(clip, frames=1).frames.shape == (1, 48, 64, 3)


def test_films_that_break_off_or_are_damaged_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mkv", "libx264", gop_size=5).read_bytes()
    (cut := tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=r"cut\.mkv' breaks off after .* of 3\.0 s; give a whole file"):
        read_video(cut)
    content = bytearray(write(tmp_path / "whole.mp4", "libx264", gop_size=5).read_bytes())
    start, end = content.index(b"mdat"), content.index(b"moov")
    middle = (start + end) // 2
    content[middle - 400 : middle + 400] = bytes(800)
    (damaged := tmp_path / "damaged.mp4").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged\.mp4'") as refused:
        read_video(damaged, "all")
    assert "\n" not in str(refused.value)
