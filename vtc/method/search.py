"""Searches for a schedule on calibration data (arXiv:2412.00556): rates layer by layer, or a sigmoid's steepness.

Both call `evaluate` with the rates of all layers, which is to run a method with ``schedule=rates`` on the calibration
samples and to return a metric, higher being better.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from vtc.errors import VTCError
from vtc.method.schedule import Rates, Sigmoid, rates

Evaluate = Callable[[Rates], float]


def g_search(
    evaluate: Evaluate, untouched: float, layers: int, *, tolerance: float = 0.005, step: float = 0.05
) -> Rates:
    """G-Search: from the first layer to the last, the smallest rate at which the metric stays what it was.

    Layer l takes the smallest ``c_l <= c_l-1`` of the grid step, 2 step, ..., 1 for which the metric is at least
    ``untouched - tolerance * |untouched|`` while all deeper layers use c_l too. untouched: the metric of the model with
    nothing attached. layers: of the LLM; the first one sees everything. Found by bisection, so the metric should not
    rise where rates fall; about log2(1 / step) calls for the layers that drop much, none behind the smallest rate.

    Departures from the paper: no code is known; grid, tolerance and bisection are ours.

    >>> def metric(rates):  # what every layer needs, in turn
    ...     return 1 - sum(max(0, need - rate) for need, rate in zip((1, 0.8, 0.5, 0.2), rates))
    >>> g_search(metric, untouched=1.0, layers=4, step=0.1)
    (1.0, 0.8, 0.5, 0.2)
    """
    if layers < 1 or tolerance < 0 or not 0 < step <= 1:
        raise VTCError(
            f"layers={layers!r}, tolerance={tolerance!r}, step={step!r}: pass the layers of the LLM, a share of the "
            "metric that may be lost, such as 0.005, and a step of rates up to 1, such as 0.05"
        )
    number = round(1 / step)
    grid = [point / number for point in range(1, number + 1)]
    found = [1.0]
    least = untouched - tolerance * abs(untouched)
    while len(found) < layers:

        def good(rate: float) -> bool:
            return evaluate((*found, *[rate] * (layers - len(found)))) >= least

        del grid[bisect_left(grid[:-1], True, key=good) + 1 :]  # the largest one is what the layer in front passed
        found.append(grid[-1])
    return tuple(found)


def sigmoid_search(
    evaluate: Evaluate, layers: int, mean: float, *, between: tuple[float, float] = (1.0, 64.0), points: int = 7
) -> float:
    """The steepness a of `Sigmoid` whose rates with this mean do best; write it as ``schedule="sigmoid(a)"``.

    `points` values between the bounds, in equal ratios, and as many again between the neighbours of the best one; of
    equals the less steep one. Departures from the paper, which searches by Bayesian optimisation: this.

    >>> round(sigmoid_search(lambda rates: -abs(rates[4] - 0.75), layers=16, mean=0.5), 1)
    5.0
    """
    low, high = between
    if not 0 < low < high or points < 3:
        raise VTCError(f"between={between!r}, points={points!r}: pass rising bounds above 0, and at least 3 points")
    for _ in range(2):
        ratio = (high / low) ** (1 / (points - 1))
        tried: list[float] = [low * ratio**point for point in range(points)]
        best = max(tried, key=lambda steepness: evaluate(rates(Sigmoid(steepness), mean, layers)))
        low, high = max(low, best / ratio), min(high, best * ratio)
    return best
