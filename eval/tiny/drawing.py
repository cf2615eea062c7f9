"""Drawing on float images: resampling, backgrounds, anti-aliased shapes, blending.

Everything is computed in float64, so that last-digit differences between machines vanish when pixels become uint8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sample(image: Array, rows: Array, columns: Array) -> Array:
    """Bilinear values of a (H, W) image at float pixel coordinates; 0 outside. Returns the shape of `rows`."""
    height, width = image.shape
    padded = np.zeros((height + 2, width + 2))
    padded[1:-1, 1:-1] = image
    y = np.clip(rows + 1, 0, height + 0.999)
    x = np.clip(columns + 1, 0, width + 0.999)
    top, left = y.astype(np.int64), x.astype(np.int64)
    fy, fx = y - top, x - left
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return np.asarray(upper * (1 - fy) + lower * fy)


def enlarge(grid: Array, size: int) -> Array:
    """Bilinear enlargement of a (h, w, C) grid to (size, size, C), corners aligned."""

    def axis(cells: int) -> tuple[NDArray[np.int64], Array]:
        positions = np.linspace(0, cells - 1, size)
        low = np.minimum(positions.astype(np.int64), cells - 2)
        return low, positions - low

    top, fy = axis(grid.shape[0])
    left, fx = axis(grid.shape[1])
    rows = grid[top] * (1 - fy)[:, None, None] + grid[top + 1] * fy[:, None, None]
    return np.asarray(rows[:, left] * (1 - fx)[None, :, None] + rows[:, left + 1] * fx[None, :, None])


def blend(image: Array, top: int, left: int, coverage: Array, colour: Array | float) -> None:
    """Mix `colour` (RGB or gray, 0-255) into `image` (H, W, 3) in place, weighted by `coverage` (h, w) in 0..1."""
    height, width = coverage.shape
    area = image[top : top + height, left : left + width]
    area += coverage[..., None] * (colour - area)


def _muted(values: Array, saturation: float) -> Array:
    """Pull the last axis towards its mean."""
    gray = values.mean(axis=-1, keepdims=True)
    return np.asarray(gray + saturation * (values - gray))


def _flat(rng: np.random.Generator, size: int) -> Array:
    return np.zeros((size, size, 3))


def _gradient(rng: np.random.Generator, size: int) -> Array:
    ramp = np.linspace(-1, 1, size)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(5, 40)
    plane = strength * (math.cos(angle) * ramp[:, None] + math.sin(angle) * ramp[None, :])
    return np.repeat(plane[..., None], 3, axis=2)


def _noise(rng: np.random.Generator, size: int) -> Array:
    cells = int(rng.integers(4, 14))
    return 22 * enlarge(_muted(rng.normal(0, 1, (cells, cells, 3)), 0.35), size)


def _stripes(rng: np.random.Generator, size: int) -> Array:
    t = np.arange(size, dtype=np.float64)
    angle, period, strength = rng.uniform(0, math.pi), rng.uniform(6, 26), rng.uniform(8, 28)
    wave = np.sin((math.cos(angle) * t[:, None] + math.sin(angle) * t[None, :]) * (2 * math.pi / period))
    return np.repeat(strength * wave[..., None], 3, axis=2)


def _texture(rng: np.random.Generator, size: int) -> Array:
    """Sum of five octaves of noise, each of half the amplitude and about twice the frequency of the one before."""
    cells, strength = int(rng.integers(3, 6)), rng.uniform(18, 34)
    total = np.zeros((size, size, 3))
    for octave in range(5):
        fine = cells * 2**octave + 1
        total += 0.5**octave * enlarge(_muted(rng.normal(0, 1, (fine, fine, 3)), 0.4), size)
    return strength * total


BACKGROUNDS: tuple[Callable[[np.random.Generator, int], Array], ...] = (_flat, _gradient, _noise, _stripes, _texture)


def background(rng: np.random.Generator, size: int) -> Array:
    """One of the five kinds of `BACKGROUNDS` around a muted base colour; (size, size, 3), roughly 0-255."""
    kind = int(rng.integers(len(BACKGROUNDS)))
    base = _muted(rng.uniform(70, 185, 3), 0.35)
    return base + BACKGROUNDS[kind](rng, size)


def clutter(rng: np.random.Generator, image: Array, strokes: int) -> None:
    """Draw short gray strokes, a little lighter or darker than what they cover."""
    height, width = image.shape[:2]
    for _ in range(strokes):
        half, angle, thickness = rng.uniform(4, 16), rng.uniform(0, math.pi), rng.uniform(0.7, 3.0)
        reach = int(half) + 3
        cy, cx = rng.uniform(reach, (height - reach - 1, width - reach - 1))
        gray = image[int(cy), int(cx)].mean() + (1 if rng.random() < 0.5 else -1) * rng.uniform(15, 45)
        top, left = int(cy) - reach, int(cx) - reach
        x, y = rotated_grid(top, left, 2 * reach, 2 * reach, cy, cx, angle)
        distance = np.maximum(np.abs(x) - half, np.abs(y) - thickness)
        blend(image, top, left, 0.8 * np.clip(0.5 - distance, 0, 1), gray)


def rotated_grid(
    top: int, left: int, height: int, width: int, cy: float, cx: float, angle: float
) -> tuple[Array, Array]:
    """Coordinates (x, y) of the pixels of a window in a frame centred on (cx, cy) and turned by `angle` radians."""
    dy = np.arange(top, top + height, dtype=np.float64)[:, None] - cy
    dx = np.arange(left, left + width, dtype=np.float64)[None, :] - cx
    return dx * math.cos(angle) + dy * math.sin(angle), -dx * math.sin(angle) + dy * math.cos(angle)


def _star(x: Array, y: Array, r: float) -> Array:
    """Distance to a five-pointed star with one tip up: fold to one tenth, then the distance to one edge."""
    sector = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(x, y)
    inner = 0.42 * r
    ex, ey = inner * math.cos(sector / 2) - r, inner * math.sin(sector / 2)
    length = math.hypot(ex, ey)
    return np.asarray(((radius * np.cos(angle) - r) * ey - radius * np.sin(angle) * ex) / length)


def _cross(x: Array, y: Array, r: float) -> Array:
    a, b = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(a - r, b - 0.32 * r), np.maximum(b - r, a - 0.32 * r))


def _triangle(x: Array, y: Array, r: float) -> Array:
    low = y - 0.2 * r
    half = math.sqrt(3) / 2
    return np.maximum(np.maximum(half * x - 0.5 * low, -half * x - 0.5 * low), low) - 0.56 * r


_DISTANCE: dict[str, Callable[[Array, Array, float], Array]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r,
    "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - 0.86 * r,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def shape_coverage(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Fraction of each pixel covered by `shape` (a name of `scenes.SHAPES`) of `radius` pixels, 0..1."""
    return np.clip(0.5 - _DISTANCE[shape](x, y, radius), 0, 1)
