"""Pictures with their tokens on them: kept bright, dropped dark, merged in a colour of their group, ranks as heat."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtc.app.media import Video
from vtc.app.show.geometry import Media
from vtc.app.show.look import Left, Look
from vtc.batch.places import Places

Drawing = Literal["kept", "scores"]
Pixels = NDArray[np.float32]

DARK = 0.22
"""Brightness of what was dropped."""
TINT = 0.45
"""Share of a group's colour in the tokens that merged."""
HEAT = np.array([(13, 8, 80), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float32)
"""Colours of the lowest to the highest score."""


def panels(look: Look, item: int, side: int) -> list[tuple[str, Pixels]]:
    """Name and pixels [H, W, 3] in [0, 255] of every panel of an item, the longer side `side` pixels."""
    media, window, names = look.media[item], look.windows[item], look.places[item].panels
    return [(name, _base(media, window, number, len(names), side)) for number, name in enumerate(names)]


def _base(media: Media, window: Sequence[float], number: int, count: int, side: int) -> Pixels:
    frames = media.frames if isinstance(media, Video) else [np.asarray(media)]
    picture = Image.fromarray(frames[number * len(frames) // count if isinstance(media, Video) else 0])
    left, top, right, bottom = (
        round(edge * length) for edge, length in zip(window, (*picture.size, *picture.size), strict=True)
    )
    picture = picture.crop((left, top, right, bottom)).convert("RGB")
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(picture.resize(size, way), np.float32)


def paint(places: Places, left: Left, panel: int, base: Pixels, drawing: Drawing = "kept") -> Image.Image:
    """One panel as a stage left it, or with what the stage ranked its tokens by."""
    owner = owners(places, panel, base.shape[0], base.shape[1])
    known = owner >= 0
    if drawing == "scores":
        return _image(_heat(base, owner, known, left))
    grey = base.mean(2, keepdims=True)
    gone = DARK * (0.6 * grey + 0.4 * base)
    alive = known & left.alive[owner]
    made = np.where((alive | ~known)[..., None], base, gone)
    if left.into is not None:
        made = _groups(made, base, owner, known, left)
    return _image(made)


def owners(places: Places, panel: int, height: int, width: int) -> NDArray[np.int64]:
    """[height, width] number of the token that each pixel of a panel belongs to, -1 where none does."""
    found = np.full((height, width), -1, np.int64)
    numbers = (places.panel == panel).nonzero().flatten().tolist()
    scaled = (places.box.cpu().numpy() * (width, height, width, height))[numbers].round().astype(int).tolist()
    for number, (left, top, right, bottom) in zip(numbers, scaled, strict=True):
        found[top:bottom, left:right] = number
    return found


def _groups(made: Pixels, base: Pixels, owner: NDArray[np.int64], known: NDArray[np.bool_], left: Left) -> Pixels:
    """Tokens that share an anchor in its colour; the anchor has a border."""
    assert left.into is not None
    anchors, count = np.unique(left.into[left.into >= 0], return_counts=True)
    shared = np.zeros(len(left.into), bool)
    shared[anchors[count > 1]] = True
    anchor = left.into[owner]
    merged = known & (anchor >= 0) & shared[anchor]
    colours = np.array([_colour(number) for number in range(len(left.into))], np.float32)
    tinted = (1 - TINT) * base + TINT * colours[anchor]
    made = np.where(merged[..., None], tinted, made)
    border = _border(owner) & merged & (anchor == owner)
    return np.where(border[..., None], colours[anchor], made)


def _border(owner: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels next to those of another token."""
    wide = np.pad(owner, 1, constant_values=-2)
    around = wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]
    edge: NDArray[np.bool_] = np.any([other != owner for other in around], axis=0)
    return edge


def _heat(base: Pixels, owner: NDArray[np.int64], known: NDArray[np.bool_], left: Left) -> Pixels:
    """The picture under a colour per token, from the lowest to the highest rank, so that outliers hide nothing."""
    assert left.scores is not None
    ranked = ~np.isnan(left.scores)
    share = np.zeros(len(left.scores), np.float32)
    share[ranked] = left.scores[ranked].argsort(kind="stable").argsort(kind="stable") / max(1, ranked.sum() - 1)
    at = share[owner] * (len(HEAT) - 1)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    colour = HEAT[low] + (at - low)[..., None] * (HEAT[low + 1] - HEAT[low])
    return np.where((known & ranked[owner])[..., None], 0.35 * base + 0.65 * colour, DARK * base)


def _colour(number: int) -> tuple[float, float, float]:
    """Of a group; neighbouring numbers are far apart on the wheel."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, 1.0)
    return 255 * red, 255 * green, 255 * blue


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
