"""Still pictures: upright, RGB, 8 bits, whole and one at a time, whatever Pillow is set to."""

from __future__ import annotations

import base64
import io
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vtc.app.images import PIXELS, name_of, open_image, pillow_defaults
from vtc.errors import InputError

RAW = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
ORIENTATION = 0x0112
UNDO = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> the Image.Transpose it takes back
BY_WAY: dict[str, Callable[[Path], Any]] = {
    "path": lambda file: file,
    "string": str,
    "bytes": Path.read_bytes,
    "file url": lambda file: file.as_uri(),
    "data url": lambda file: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode(),
    "picture": lambda file: loaded(file),
    "picture of a task that converts": lambda file: loaded(file).convert("RGB"),
    "picture of a task that turns": lambda file: ImageOps.exif_transpose(loaded(file)),
    "opened before": lambda file: open_image(file),
}


def loaded(file: Path) -> Image.Image:
    with Image.open(file) as image:
        image.load()
    return image


def gradient(kind: type) -> Any:
    return np.linspace(0, 65535, 60).astype(kind).reshape(5, 12)


@pytest.fixture(params=[False, True], ids=["strict", "lenient"])
def process_state(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pillow as shipped, and as lmms-eval and its tasks leave it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None if request.param else PIXELS)
    yield
    assert request.param == ImageFile.LOAD_TRUNCATED_IMAGES
    assert request.param == (Image.MAX_IMAGE_PIXELS is None)


@pytest.mark.parametrize("suffix", ["png", "tif"])  # lossless; Pillow itself turns TIFF files
@pytest.mark.parametrize("tag", UNDO)
def test_a_picture_is_turned_upright_once(tmp_path: Path, tag: int, suffix: str) -> None:
    raw = Image.fromarray(RAW).transpose(Image.Transpose(UNDO[tag]))
    exif = raw.getexif()
    exif[ORIENTATION] = tag
    raw.save(file := tmp_path / f"photo.{suffix}", exif=exif)
    for way, source in BY_WAY.items():
        assert np.array_equal(np.asarray(open_image(source(file))), RAW), way


def test_a_picture_that_is_right_already_is_not_copied() -> None:
    picture = Image.fromarray(RAW)
    assert open_image(picture) is picture


def test_sixteen_bits_are_scaled_by_their_range(tmp_path: Path) -> None:
    expected = np.linspace(0, 255, 60).reshape(5, 12)
    for suffix in ("png", "tif"):
        Image.fromarray(gradient(np.uint16)).save(file := tmp_path / f"grey.{suffix}")
        for source in (file, loaded(file)):
            shown = np.asarray(open_image(source)).astype(int)
            assert shown.shape == (5, 12, 3) and np.abs(shown - expected[..., None]).max() <= 1
    dark = Image.fromarray((gradient(np.uint16) // 16).astype(np.uint16))  # twelve bits in sixteen: no guess is made
    assert np.asarray(open_image(dark)).max() == 16


def test_floats_are_scaled_from_zero_to_one_and_refused_beyond(tmp_path: Path) -> None:
    Image.fromarray((gradient(np.float64) / 65535).astype(np.float32)).save(file := tmp_path / "grey.tif")
    assert np.abs(np.asarray(open_image(file))[..., 0] - np.linspace(0, 255, 60).reshape(5, 12)).max() <= 1
    for wrong in (255.0, -0.5, np.nan, np.inf):
        Image.fromarray(np.array([[0.5, wrong]], np.float32)).save(file := tmp_path / "wrong.tif")
        with pytest.raises(InputError, match=r"wrong\.tif.*floats outside \[0, 1\]"):
            open_image(file)


def test_wide_integers_are_refused(tmp_path: Path) -> None:
    Image.fromarray(gradient(np.int32)).save(file := tmp_path / "wide.tif")
    with pytest.raises(InputError, match=r"wide\.tif.*32-bit integers \(0 to 65535\).*save it with 8 bits"):
        open_image(file)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    picture = Image.fromarray(RAW).convert("RGBA")
    picture.putalpha(Image.fromarray(RAW[..., 0]))
    picture = picture.convert("P").convert(mode) if mode == "PA" else picture.convert("RGB" if mode == "HSV" else mode)
    assert np.array_equal(np.asarray(open_image(picture)), np.asarray(picture.convert("RGB")))


def test_alpha_is_dropped_also_from_a_palette(tmp_path: Path) -> None:
    colours = Image.fromarray(RAW).quantize(8)
    colours.save(file := tmp_path / "palette.png", transparency=bytes(range(8)))
    assert np.array_equal(np.asarray(open_image(file)), np.asarray(colours.convert("RGB")))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_no_picture(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 10), (50 * number, 0, 0)) for number in range(4)]
    frames[0].save(file := tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    for source in (file, Image.open(file)):
        with pytest.raises(InputError, match=rf"moving\.{suffix}' holds 4 frames; .*--video"):
            open_image(source)
        if isinstance(source, Image.Image):
            source.close()
    frames[0].save(file, save_all=True)
    assert open_image(file).size == (20, 10)


def test_pages_are_counted_without_reduced_copies(tmp_path: Path) -> None:
    pages = [Image.fromarray(RAW), Image.fromarray(RAW[::2, ::2])]
    pages[0].save(file := tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=r"scan\.tif' holds 2 pages; save the one that is meant"):
        open_image(file)
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}  # type: ignore[attr-defined]
    pages[0].save(file, save_all=True, append_images=pages[1:])
    assert np.array_equal(np.asarray(open_image(file)), RAW)


def test_a_photograph_with_a_preview_is_one_picture(tmp_path: Path) -> None:
    photo = Image.fromarray(RAW)
    photo.save(file := tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[photo.resize((6, 4))])
    with Image.open(file) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)  # type: ignore[attr-defined]
    assert open_image(file).size == (60, 40)


@pytest.mark.usefixtures("process_state")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_a_broken_file_is_refused_whatever_pillow_is_set_to(tmp_path: Path, kind: str) -> None:
    Image.fromarray(np.kron(RAW, np.ones((8, 8, 1), np.uint8))).save(whole := io.BytesIO(), kind)
    (file := tmp_path / "broken").write_bytes(whole.getvalue()[: whole.tell() * 2 // 3])
    for source in (file, file.read_bytes()):
        with pytest.raises(InputError, match="cannot be read"):
            open_image(source)


@pytest.mark.usefixtures("process_state")
def test_the_limit_of_size_does_not_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (100, 60)).save(file := tmp_path / "large.png")
    monkeypatch.setattr("vtc.app.images.PIXELS", 4000)
    assert open_image(file).size == (100, 60)  # above the size that Pillow warns of, below the one it refuses
    monkeypatch.setattr("vtc.app.images.PIXELS", 2000)
    with pytest.raises(InputError, match=r"large\.png' is too large .*scale it down"):
        open_image(file)


def test_settings_of_pillow_come_back_and_threads_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with pillow_defaults():
            inside.set()
            leave.wait(10)

    seen: list[bool] = []

    def look() -> None:
        with pillow_defaults():
            seen.append(ImageFile.LOAD_TRUNCATED_IMAGES)

    first, second = threading.Thread(target=hold), threading.Thread(target=look)
    first.start()
    inside.wait(10)
    second.start()
    leave.set()
    first.join()
    second.join()
    assert seen == [False] and ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_addresses_are_fetched_or_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAW).save(whole := io.BytesIO(), "PNG")
    asked = []

    def fetch(request: Any, timeout: float) -> Any:
        asked.append(request.full_url)
        if "none" in request.full_url:
            raise OSError("no route\nto host")
        return io.BytesIO(whole.getvalue())

    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    assert np.array_equal(np.asarray(open_image("https://pictures.example/a.png")), RAW)
    with pytest.raises(InputError, match=r"image 'http://none\.example/b\.png' cannot be fetched \(no route to host\)"):
        open_image("http://none.example/b.png")
    assert asked == ["https://pictures.example/a.png", "http://none.example/b.png"]


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (text := tmp_path / "text.png").write_text("no picture")
    for source, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.png", r"none\.png' does not exist"),
        (text, r"text\.png' cannot be read"),
        (b"", "image cannot be read"),
        (7, "cannot be of type int"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (Image.new("La", (2, 2)), "cannot be read"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            open_image(source)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)


def test_a_picture_knows_its_file(tmp_path: Path) -> None:
    Image.fromarray(RAW).save(file := tmp_path / "a.png")
    assert name_of(open_image(file)) == name_of(open_image(file).resize((5, 5))) == f"image {str(file)!r}"
    assert name_of(Image.new("RGB", (4, 4))) == "image"
