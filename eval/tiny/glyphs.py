"""Things to read: a 5x7 dot font for three-letter words, and the handwritten digits of scikit-learn."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vtc.errors import InputError
from vtc.eval.tiny.drawing import Array

WORDS = ("cat", "cap", "can", "car", "bat", "bar", "ban", "bag", "mat", "map", "man", "mad")
TRAIN_DIGITS = 1400  # of 1797; the others are never seen in training

_FONT = {
    "a": ".###. #...# #...# ##### #...# #...# #...#",
    "b": "####. #...# #...# ####. #...# #...# ####.",
    "c": ".#### #.... #.... #.... #.... #.... .####",
    "d": "###.. #..#. #...# #...# #...# #..#. ###..",
    "g": ".#### #.... #.... #..## #...# #...# .####",
    "m": "#...# ##.## #.#.# #.#.# #...# #...# #...#",
    "n": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "p": "####. #...# #...# ####. #.... #.... #....",
    "r": "####. #...# #...# ####. #.#.. #..#. #...#",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
}


def word_bitmap(word: str) -> Array:
    """Dots of a word with a margin of one dot, (9, 6 * letters + 2) of 0 or 1."""
    bitmap = np.zeros((9, 6 * len(word) + 2))
    for index, letter in enumerate(word):
        rows = [[float(dot == "#") for dot in row] for row in _FONT[letter].split()]
        bitmap[1:8, 1 + 6 * index : 6 + 6 * index] = rows
    return bitmap


@lru_cache(maxsize=1)
def _digits() -> tuple[Array, NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            "scenes draw the digits of scikit-learn: pip install 'visual-token-compression[eval]'"
        ) from error
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return np.asarray(data.images, dtype=np.float64)[order] / 16, np.asarray(data.target, dtype=np.int64)[order]


def draw_digit(rng: np.random.Generator, train: bool) -> tuple[Array, int]:
    """A random handwritten digit: (8, 8) ink in 0..1 and its value, from the images for training or from the others."""
    images, values = _digits()
    index = int(rng.integers(TRAIN_DIGITS)) if train else int(rng.integers(TRAIN_DIGITS, len(values)))
    return images[index], int(values[index])
