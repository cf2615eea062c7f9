"""AIM's falling schedule: which share of the tokens every LLM layer sees, and how to make their mean meet a budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from vtc.method.budget import CACHED, NOISE, spend


def falling_shares(layers: int, start: float, end: float) -> tuple[float, ...]:
    """Shares of a schedule that falls linearly: all tokens up to layer `start`, none from layer `end` on.

    >>> falling_shares(6, 1, 5)
    (1.0, 1.0, 0.75, 0.5, 0.25, 0.0)
    """
    return tuple(min(1.0, max(0.0, 1 - (layer - start) / (end - start))) for layer in range(layers))


def layer_tokens(entered: int, shares: Sequence[float]) -> list[int]:
    """Tokens that every layer sees, shares rounded down.

    >>> layer_tokens(150, falling_shares(5, 0, 8))
    [150, 131, 112, 93, 75]
    """
    return [math.floor(entered * share + NOISE) for share in shares]


@functools.lru_cache(CACHED)
def moved_tokens(entered: int, total: int, layers: int, start: int, end: int) -> tuple[int, ...]:
    """Tokens that every layer sees when the schedule from `start` to `end` moves, so that they sum up to `total`.

    It moves by fractions of a layer. Moved to before layer 0 it begins there and gets steeper; layer 0 sees everything.
    Raises BudgetError where that alone is more than a token per layer too many.

    >>> moved_tokens(100, 600, 8, 2, 6), moved_tokens(100, 150, 8, 2, 6)
    ((100, 100, 100, 100, 87, 62, 37, 12), (100, 50, 0, 0, 0, 0, 0, 0))
    """

    def curve(shift: float) -> list[int]:
        first = max(start + shift, 0.0)
        return layer_tokens(entered, falling_shares(layers, first, max(end + shift, first + 1e-6)))

    return tuple(spend(total, [1] * layers, curve, between=(-float(end), float(layers)), slack=layers, of=entered))


@functools.lru_cache(CACHED)
def entering_tokens(count: int, fixed: int, total: int, shares: tuple[float, ...]) -> int:
    """How many of `count` tokens should enter, beside `fixed` others, so that the layers' tokens sum up to `total`.

    At least one and at most all of them; layer 0 sees what entered.

    >>> entering_tokens(576, 0, 32 * 72, falling_shares(32, 13, 21))
    132
    """

    def curve(x: float) -> list[int]:
        return layer_tokens(max(1, math.floor(count * x + 0.5)) + fixed, shares)

    return spend(total, [1] * len(shares), curve, slack=math.inf)[0] - fixed
