"""Still pictures as every model is shown them: upright, RGB, 8 bits a channel, whatever file or object they come from.

One function reads them for `vtc generate`, sweeps and lmms-eval, so that one file is the same pixels everywhere.

| what comes in | what the model is shown |
|---|---|
| EXIF orientation | applied, once |
| 16-bit grey | scaled by its range: 0 is black, 65535 is white |
| float | 0 is black, 1 is white; other values are refused |
| 32-bit integers | refused: no white is defined for them |
| alpha, transparent palettes | the alpha is dropped, as `transformers.image_utils.load_image` does |
| CMYK, grey, bilevel, palette | converted as Pillow does |
| several frames or pages | refused; previews beside a photograph and reduced copies inside a TIFF count as none |
| a file that breaks off | refused |
"""

from __future__ import annotations

import io
import os
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from vtc.errors import InputError, one_line

SCHEMES = ("http://", "https://", "file://", "data:")
PREVIEWS = ("MPO", "PSD")  # formats whose further "frames" are previews, gain maps or layers of the first
PIXELS = 89_478_485  # Pillow's own limit: it refuses pictures with more than twice as many
_LOCK = threading.RLock()


@contextmanager
def pillow_defaults() -> Iterator[None]:
    """Pillow as it is shipped, whatever an imported library set for the process; put back afterwards.

    lmms-eval lets Pillow fill up broken files with grey when it is imported, and some of its tasks move the size limit.
    """
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, or about a size that is admitted
        before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, PIXELS
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """The picture `source` as a model is shown it, see the module's table; a picture that is so already is returned.

    source: a path, a URL (http, https, file, data), the bytes of a file, or a picture. `name_of` finds the name again.
    Raises InputError for anything that is missing, broken, no picture, or more than one.
    """
    name = name_of(source)
    try:
        with pillow_defaults():
            if isinstance(source, Image.Image):
                return _shown(source, name)
            with Image.open(_stream(source, name)) as opened:
                return _shown(opened, name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large ({one_line(error)}); scale it down first") from error
    except Exception as error:  # decoders raise whatever their formats break
        raise InputError(f"{name} cannot be read ({one_line(error)}); give a PNG, JPEG or WebP file") from error


def name_of(source: Any) -> str:
    """How messages call a picture: "image 'a.png'" where the file is known, else "image"."""
    if isinstance(source, Image.Image):
        source = source.info.get("source") or getattr(source, "filename", "")
    text = str(source) if isinstance(source, str | os.PathLike) else ""
    return f"image {text if len(text) < 300 else f'{text[:60]}...'!r}" if text else "image"


def _stream(source: Any, name: str) -> Any:
    """What Pillow opens."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise InputError(
            f"a picture cannot be of type {type(source).__name__}; give a path, a URL, bytes or a PIL image"
        )
    text = os.fspath(source)
    if text.lower().startswith(SCHEMES):
        return io.BytesIO(_download(text, name))
    if Path(text).is_dir():
        raise InputError(f"{name} is a folder; give the path of one image file, and repeat --image for several")
    if not Path(text).is_file():
        raise InputError(f"{name} does not exist; give the path of an image file")
    return Path(text)


def _download(url: str, name: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "vtc"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            content: bytes = reply.read()
            return content
    except Exception as error:
        raise InputError(f"{name} cannot be fetched ({one_line(error)}); download it and give the file") from error


def _shown(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"{name} is {image.width} x {image.height} pixels; give a picture with at least one")
    turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    if type(image) is Image.Image and image.mode == "RGB" and not turned:
        return image
    _check_one(image, name)
    shown = _rgb(ImageOps.exif_transpose(image), name)
    shown.info["source"] = image.info.get("source") or getattr(image, "filename", "")
    return shown


def _check_one(image: Image.Image, name: str) -> None:
    """InputError if the file holds several pictures."""
    count = 1 if image.format in PREVIEWS else getattr(image, "n_frames", 1)
    if image.format == "TIFF" and count > 1:
        count = max(1, sum(_full_page(image, number) for number in range(count)))
        image.seek(0)
        if count > 1:
            raise InputError(f"{name} holds {count} pages; save the one that is meant in a file of its own")
    if count > 1:
        raise InputError(f"{name} holds {count} frames; give an animation with --video, or save one frame")


def _full_page(image: Any, number: int) -> bool:
    """Whether a TIFF page is a picture of its own: by its tag NewSubfileType no reduced copy and no mask."""
    image.seek(number)
    return not image.tag_v2.get(254, 0) & 0b101


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        floats = np.asarray(image)
        if not ((floats >= 0) & (floats <= 1)).all():
            raise InputError(f"{name} holds floats outside [0, 1], for which no white is defined; scale them to [0, 1]")
        return Image.fromarray(np.rint(floats * 255).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        span = "{} to {}".format(*image.getextrema())
        raise InputError(f"{name} holds 32-bit integers ({span}), for which no white is defined; save it with 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way warns
    return image.convert("RGB")
