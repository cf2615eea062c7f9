"""Video files: which frames are read, and what broken files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vtc.errors import InputError
from vtc.eval.media import frame_indices, read_video

FRAMES, RATE = 30, 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-second clip whose frame i has the grey value 8 i."""
    import av

    file = tmp_path_factory.mktemp("clips") / "ramp.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(FRAMES):
            pixels = np.full((48, 64, 3), 8 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file


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
