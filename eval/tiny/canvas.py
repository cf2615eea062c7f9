"""A picture under construction, of any size: free places, and things drawn on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vtc.eval.tiny import drawing
from vtc.eval.tiny.drawing import Array
from vtc.eval.tiny.glyphs import WORDS, draw_digit, word_bitmap

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
_TRIES = 30
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Item:
    """A "shape", "digit" or "word" (its `kind`). The box is left, top, right, bottom in pixels."""

    kind: str
    name: str
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """x and y of the middle of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def width(self) -> float:
        """Pixels from left to right."""
        return self.box[2] - self.box[0]


@dataclass
class Canvas:
    """A float picture (H, W, 3) of roughly 0-255, the boxes that are taken and the things drawn so far."""

    rng: np.random.Generator
    image: Array
    gap: float = 2.0  # px that stay free around every thing
    accept: Callable[[Box], bool] = lambda box: True  # a further condition on free places
    boxes: list[Box] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    @classmethod
    def blank(cls, rng: np.random.Generator, height: int, width: int) -> Canvas:
        """A background without clutter."""
        return cls(rng, drawing.background(rng, max(height, width))[:height, :width].copy())

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]

    def place(self, width: float, height: float) -> tuple[float, float] | None:
        """Left and top of a free area away from the border and from other things; None after 30 tries."""
        gap, (rows, columns) = self.gap, self.size
        for _ in range(_TRIES):
            left, top = self.rng.uniform(gap, columns - width - gap), self.rng.uniform(gap, rows - height - gap)
            right, bottom = left + width, top + height
            free = (
                right + gap < b[0] or b[2] + gap < left or bottom + gap < b[1] or b[3] + gap < top for b in self.boxes
            )
            if all(free) and self.accept((left, top, right, bottom)):
                self.boxes.append((left, top, right, bottom))
                return left, top
        return None

    def _add_plate(self, kind: str, name: str, ink: Array, opacity: float) -> Item | None:
        """Draw (h, w) ink on a contrasting plate at a free place, if there is one."""
        height, width = ink.shape
        place = self.place(width, height)
        if place is None:
            return None
        left, top = int(place[0]), int(place[1])
        dark = self.rng.random() < 0.5
        drawing.blend(self.image, top, left, np.full(ink.shape, opacity), 230.0 if dark else 30.0)
        drawing.blend(self.image, top, left, ink, 18.0 if dark else 242.0)
        self.items.append(Item(kind, name, "", (left, top, left + width, top + height)))
        return self.items[-1]

    def add_word(self, scale: tuple[float, float]) -> Item | None:
        """A random word; `scale` bounds the pixels per dot of the font."""
        word = WORDS[int(self.rng.integers(len(WORDS)))]
        factor = self.rng.uniform(*scale)
        bitmap = word_bitmap(word)
        rows = (np.arange(int(bitmap.shape[0] * factor)) / factor).astype(np.int64)
        columns = (np.arange(int(bitmap.shape[1] * factor)) / factor).astype(np.int64)
        return self._add_plate("word", word, bitmap[rows][:, columns], 0.85)

    def add_digit(self, size: tuple[int, int], train: bool) -> Item | None:
        """A random handwritten digit, `size[0]` to `size[1] - 1` pixels wide."""
        ink, value = draw_digit(self.rng, train)
        side, angle = int(self.rng.integers(*size)), self.rng.uniform(-0.15, 0.15)
        middle = (side - 1) / 2
        x, y = drawing.rotated_grid(0, 0, side, side, middle, middle, angle)
        step = 8.6 / side
        ink = drawing.sample(ink, y * step + 3.5, x * step + 3.5)
        return self._add_plate("digit", str(value), np.clip(1.3 * ink, 0, 1), 0.7)

    def add_shape(self, radius: tuple[float, float], shapes: tuple[str, ...], colours: tuple[str, ...]) -> Item | None:
        """A shape of a random form, colour, size and rotation."""
        rng = self.rng
        r = rng.uniform(*radius)
        place = self.place(2 * r, 2 * r)
        if place is None:
            return None
        name, colour = shapes[int(rng.integers(len(shapes)))], colours[int(rng.integers(len(colours)))]
        cx, cy, angle = place[0] + r, place[1] + r, rng.uniform(-0.3, 0.3)
        paint = np.clip(np.array(PALETTE[colour]) + rng.normal(0, 10, 3), 0, 255)
        draw_shape(self.image, name, (cx, cy), r, angle, paint)
        self.items.append(Item("shape", name, colour, (cx - r, cy - r, cx + r, cy + r)))
        return self.items[-1]

    def finish(self) -> NDArray[np.uint8]:
        """The picture with pixel noise, uint8 (H, W, 3)."""
        self.image += self.rng.normal(0, 1, (*self.size, 1)) * self.rng.uniform(2, 14)
        return np.clip(self.image, 0, 255).astype(np.uint8)


def draw_shape(image: Array, name: str, centre: tuple[float, float], radius: float, angle: float, paint: Array) -> None:
    """Draw a shape into `image` (H, W, 3) in place; what lies outside is cut off."""
    (cx, cy), reach = centre, int(radius) + 2
    top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
    height, width = min(image.shape[0], int(cy) + reach + 1) - top, min(image.shape[1], int(cx) + reach + 1) - left
    if height <= 0 or width <= 0:
        return
    x, y = drawing.rotated_grid(top, left, height, width, cy, cx, angle)
    drawing.blend(image, top, left, drawing.shape_coverage(name, x, y, radius), paint)


def subset(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[str, ...]:
    """At least two of the names, so that scenes often hold several shapes of one kind or colour."""
    order = rng.permutation(len(names))[: int(rng.integers(2, len(names) + 1))]
    return tuple(names[int(index)] for index in order)
