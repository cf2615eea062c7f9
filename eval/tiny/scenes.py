"""Seeded scenes: a cluttered 168x168 picture with coloured shapes, sometimes a handwritten digit and a short word."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vtc.errors import unknown_name
from vtc.eval.tiny import drawing
from vtc.eval.tiny.drawing import Array
from vtc.eval.tiny.glyphs import WORDS, draw_digit, word_bitmap

SIZE = 168  # pixels
PATCH = 14  # pixels
GRID = SIZE // PATCH  # patches per side
MAX_SHAPES = 6
SPLITS = {"train": 0, "check": 1, "benchmark": 2}  # disjoint random streams; only "train" sees the training digits
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PALETTE = {
    "red": (215, 35, 35),
    "green": (35, 165, 50),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "purple": (150, 40, 170),
    "cyan": (50, 205, 215),
    "orange": (240, 135, 25),
}
COLOURS = tuple(PALETTE)


@dataclass(frozen=True)
class Item:
    """A "shape", "digit" or "word" (its `kind`). The box is left, top, right, bottom in pixels."""

    kind: str
    name: str
    colour: str
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        """x and y of the middle of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A rendered picture, uint8 (168, 168, 3), and what is in it."""

    image: NDArray[np.uint8]
    items: tuple[Item, ...]


@dataclass
class _Canvas:
    """A float picture under construction and the boxes that are taken."""

    rng: np.random.Generator
    image: Array
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    def place(self, width: float, height: float) -> tuple[float, float] | None:
        """Left and top of a free area at least 2 px from the border and from other things; None after 30 tries."""
        for _ in range(30):
            left, top = self.rng.uniform(2, SIZE - width - 2), self.rng.uniform(2, SIZE - height - 2)
            right, bottom = left + width, top + height
            if all(right + 2 < b[0] or b[2] + 2 < left or bottom + 2 < b[1] or b[3] + 2 < top for b in self.boxes):
                self.boxes.append((left, top, right, bottom))
                return left, top
        return None


def _add_plate(canvas: _Canvas, kind: str, name: str, ink: Array, opacity: float) -> None:
    """Draw (h, w) ink on a contrasting plate at a free place, if there is one."""
    height, width = ink.shape
    place = canvas.place(width, height)
    if place is None:
        return
    left, top = int(place[0]), int(place[1])
    dark = canvas.rng.random() < 0.5
    drawing.blend(canvas.image, top, left, np.full(ink.shape, opacity), 230.0 if dark else 30.0)
    drawing.blend(canvas.image, top, left, ink, 18.0 if dark else 242.0)
    canvas.items.append(Item(kind, name, "", (left, top, left + width, top + height)))


def _add_word(canvas: _Canvas) -> None:
    word = WORDS[int(canvas.rng.integers(len(WORDS)))]
    scale = canvas.rng.uniform(1.9, 2.9)
    bitmap = word_bitmap(word)
    rows = (np.arange(int(bitmap.shape[0] * scale)) / scale).astype(np.int64)
    columns = (np.arange(int(bitmap.shape[1] * scale)) / scale).astype(np.int64)
    _add_plate(canvas, "word", word, bitmap[rows][:, columns], 0.85)


def _add_digit(canvas: _Canvas, train: bool) -> None:
    rng = canvas.rng
    ink, value = draw_digit(rng, train)
    size, angle = int(rng.integers(28, 43)), rng.uniform(-0.15, 0.15)
    middle = (size - 1) / 2
    x, y = drawing.rotated_grid(0, 0, size, size, middle, middle, angle)
    step = 8.6 / size
    ink = drawing.sample(ink, y * step + 3.5, x * step + 3.5)
    _add_plate(canvas, "digit", str(value), np.clip(1.3 * ink, 0, 1), 0.7)


def _add_shape(canvas: _Canvas, shapes: tuple[str, ...], colours: tuple[str, ...]) -> None:
    rng = canvas.rng
    radius = rng.uniform(10, 21)
    place = canvas.place(2 * radius, 2 * radius)
    if place is None:
        return
    name, colour = shapes[int(rng.integers(len(shapes)))], colours[int(rng.integers(len(colours)))]
    cx, cy, angle = place[0] + radius, place[1] + radius, rng.uniform(-0.3, 0.3)
    reach = int(radius) + 2
    top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
    height, width = min(SIZE, int(cy) + reach + 1) - top, min(SIZE, int(cx) + reach + 1) - left
    x, y = drawing.rotated_grid(top, left, height, width, cy, cx, angle)
    paint = np.clip(np.array(PALETTE[colour]) + rng.normal(0, 10, 3), 0, 255)
    drawing.blend(canvas.image, top, left, drawing.shape_coverage(name, x, y, radius), paint)
    canvas.items.append(Item("shape", name, colour, (cx - radius, cy - radius, cx + radius, cy + radius)))


def _subset(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[str, ...]:
    """At least two of the names, so that scenes often hold several shapes of one kind or colour."""
    order = rng.permutation(len(names))[: int(rng.integers(2, len(names) + 1))]
    return tuple(names[int(index)] for index in order)


def make_scene(seed: int, split: str) -> Scene:
    """The scene number `seed` (at least 0) of a split of `SPLITS`; the same picture on every machine.

    >>> make_scene(3, "check").image.shape
    (168, 168, 3)
    """
    if split not in SPLITS:
        raise unknown_name("scene split", split, SPLITS)
    rng = np.random.default_rng([seed, SPLITS[split]])
    canvas = _Canvas(rng, drawing.background(rng, SIZE))
    drawing.clutter(rng, canvas.image, int(rng.integers(4, 16)))
    if rng.random() < 0.6:
        _add_word(canvas)
    if rng.random() < 0.6:
        _add_digit(canvas, split == "train")
    shapes, colours = _subset(rng, SHAPES), _subset(rng, COLOURS)
    for _ in range(int(rng.integers(1, MAX_SHAPES + 1))):
        _add_shape(canvas, shapes, colours)
    canvas.image += rng.normal(0, 1, (SIZE, SIZE, 1)) * rng.uniform(2, 14)
    return Scene(np.clip(canvas.image, 0, 255).astype(np.uint8), tuple(canvas.items))


def quadrant(item: Item) -> str:
    """Which quarter of the picture the centre of an item lies in, e.g. "top-left"."""
    x, y = item.centre
    return f"{'bottom' if y > SIZE / 2 else 'top'}-{'right' if x > SIZE / 2 else 'left'}"


def border_distance(item: Item) -> float:
    """Pixels from the centre of an item to the nearer of the two lines that part the picture into quarters."""
    x, y = item.centre
    return min(abs(x - SIZE / 2), abs(y - SIZE / 2))


def grid_overlap(item: Item) -> Array:
    """Share of every patch that the box of an item covers, (12, 12)."""
    left, top, right, bottom = item.box
    edges = np.arange(GRID + 1) * PATCH

    def along(low: float, high: float) -> Array:
        covered: Array = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
        return covered / PATCH

    return along(top, bottom)[:, None] * along(left, right)[None, :]


def centre_patch(item: Item) -> tuple[int, int]:
    """Row and column of the patch that holds the centre of an item."""
    x, y = item.centre
    return min(GRID - 1, math.floor(y / PATCH)), min(GRID - 1, math.floor(x / PATCH))
