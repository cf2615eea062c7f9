"""Seeded scenes: a cluttered 168x168 picture with coloured shapes, sometimes a handwritten digit and a short word."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtc.errors import unknown_name
from vtc.eval.tiny import drawing
from vtc.eval.tiny.canvas import COLOURS, SHAPES, Canvas, Item, subset
from vtc.eval.tiny.drawing import Array

SIZE = 168  # pixels
PATCH = 14  # pixels
GRID = SIZE // PATCH  # patches per side
MAX_SHAPES = 6
SPLITS = {"train": 0, "check": 1, "benchmark": 2}  # disjoint random streams; only "train" sees the training digits


@dataclass(frozen=True)
class Scene:
    """A rendered picture, uint8 (168, 168, 3), and what is in it."""

    image: NDArray[np.uint8]
    items: tuple[Item, ...]


def make_scene(seed: int, split: str) -> Scene:
    """The scene number `seed` (at least 0) of a split of `SPLITS`; the same picture on every machine.

    >>> make_scene(3, "check").image.shape
    (168, 168, 3)
    """
    if split not in SPLITS:
        raise unknown_name("scene split", split, SPLITS)
    rng = np.random.default_rng([seed, SPLITS[split]])
    canvas = Canvas.blank(rng, SIZE, SIZE)
    drawing.clutter(rng, canvas.image, int(rng.integers(4, 16)))
    if rng.random() < 0.6:
        canvas.add_word((1.9, 2.9))
    if rng.random() < 0.6:
        canvas.add_digit((28, 43), split == "train")
    shapes, colours = subset(rng, SHAPES), subset(rng, COLOURS)
    for _ in range(int(rng.integers(1, MAX_SHAPES + 1))):
        canvas.add_shape((10, 21), shapes, colours)
    return Scene(canvas.finish(), tuple(canvas.items))


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
