"""What the auxiliary heads predict in training: the content of every patch, and what is present in the whole scene."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vtc.eval.tiny.canvas import COLOURS, SHAPES, Box, Item
from vtc.eval.tiny.glyphs import WORDS
from vtc.eval.tiny.scenes import GRID, centre_patch, grid_overlap

PATCH_CLASSES = {  # 0 is "nothing" everywhere
    "kind": 1 + len(SHAPES) + 2,  # nothing, the six shapes, digit, word
    "colour": 1 + len(COLOURS),
    "digit": 1 + 10,
    "word": 1 + len(WORDS),
    "centre": 3,  # nothing, the middle of a shape, the middle of a digit or word
}
PRESENCE_BITS = len(SHAPES) * len(COLOURS) + 10 + len(WORDS)
CELL = 14  # px of a cell as the tower sees it, in every model
_LEGIBLE = 8.0  # px of the shorter side of a thing
_MIN_OVERLAP = 0.12  # share of a patch that a thing must cover to become its content


def _content(item: Item) -> tuple[int, int, int, int]:
    if item.kind == "shape":
        return 1 + SHAPES.index(item.name), 1 + COLOURS.index(item.colour), 0, 0
    if item.kind == "digit":
        return 1 + len(SHAPES), 0, 1 + int(item.name), 0
    return 2 + len(SHAPES), 0, 0, 1 + WORDS.index(item.name)


def patch_targets(items: Sequence[Item]) -> NDArray[np.uint8]:
    """Classes of the 144 patches in the order of `PATCH_CLASSES`, (5, 144); the largest overlap wins a patch."""
    targets = np.zeros((len(PATCH_CLASSES), GRID, GRID), dtype=np.uint8)
    best = np.full((GRID, GRID), _MIN_OVERLAP)
    for item in items:
        overlap = grid_overlap(item)
        wins = overlap > best
        best[wins] = overlap[wins]
        for row, value in enumerate(_content(item)):
            targets[row][wins] = value
        targets[4][centre_patch(item)] = 1 if item.kind == "shape" else 2
    return targets.reshape(len(PATCH_CLASSES), -1)


def legible_items(items: Sequence[Item], box: Box, rows: int, columns: int) -> list[Item]:
    """The things that a view shows at least in part and large enough to be told apart."""
    left, top, right, bottom = box
    across, down = columns * CELL / (right - left), rows * CELL / (bottom - top)  # px of the view per px of the picture
    return [
        item
        for item in items
        if min((item.box[2] - item.box[0]) * across, (item.box[3] - item.box[1]) * down) >= _LEGIBLE
        and item.box[0] < right
        and item.box[2] > left
        and item.box[1] < bottom
        and item.box[3] > top
    ]


def coverage(item: Item, box: Box, rows: int, columns: int) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The share of every cell of a view that a thing covers, (rows, columns), and its middle in cells (x, y).

    `box` is the part of the picture that the view shows, in the pixels of the picture.
    """
    left, top, right, bottom = box
    across, down = columns / (right - left), rows / (bottom - top)
    x0, x1 = (item.box[0] - left) * across, (item.box[2] - left) * across
    y0, y1 = (item.box[1] - top) * down, (item.box[3] - top) * down
    x_edges, y_edges = np.arange(columns + 1), np.arange(rows + 1)
    along_x = np.clip(np.minimum(x1, x_edges[1:]) - np.maximum(x0, x_edges[:-1]), 0, None)
    along_y = np.clip(np.minimum(y1, y_edges[1:]) - np.maximum(y0, y_edges[:-1]), 0, None)
    return along_y[:, None] * along_x[None], ((x0 + x1) / 2, (y0 + y1) / 2)


def cell_targets(items: Sequence[Item], box: Box, rows: int, columns: int) -> NDArray[np.uint8]:
    """Classes of the cells of a view, (5, rows * columns), as `patch_targets` gives them for a whole scene.

    `box` is the part of the picture, in its own pixels, that is resized to `CELL` px per cell. Things too small to be
    told apart at that size count as nothing.
    """
    targets = np.zeros((len(PATCH_CLASSES), rows, columns), dtype=np.uint8)
    best = np.full((rows, columns), _MIN_OVERLAP)
    for item in legible_items(items, box, rows, columns):
        overlap, (cx, cy) = coverage(item, box, rows, columns)
        wins = overlap > best
        best[wins] = overlap[wins]
        for row, value in enumerate(_content(item)):
            targets[row][wins] = value
        if 0 <= cx < columns and 0 <= cy < rows:
            targets[4][int(cy), int(cx)] = 1 if item.kind == "shape" else 2
    return targets.reshape(len(PATCH_CLASSES), -1)


def presence(items: Sequence[Item]) -> NDArray[np.uint8]:
    """One bit per (shape, colour), per digit and per word, (64,)."""
    bits = np.zeros(PRESENCE_BITS, dtype=np.uint8)
    pairs = len(SHAPES) * len(COLOURS)
    for item in items:
        if item.kind == "shape":
            bits[SHAPES.index(item.name) * len(COLOURS) + COLOURS.index(item.colour)] = 1
        elif item.kind == "digit":
            bits[pairs + int(item.name)] = 1
        else:
            bits[pairs + 10 + WORDS.index(item.name)] = 1
    return bits
