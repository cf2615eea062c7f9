"""Budgets of methods that prune in several layers of the LLM: how many tokens each stage leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vtc.errors import BudgetError
from vtc.method.base import StageView


def left_by_stages(view: StageView, least: Sequence[int], spans: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Tokens of each of the view's items behind every stage, by `geometric_schedule`, so that the budget is met.

    least: what a stage leaves of each item at least. spans: layers in front of the first stage, between the stages and
    behind the last one. Raises BudgetError where the layers in front already see too many tokens.
    """
    items, layers = view.items, sum(spans)
    left: list[tuple[int, ...]] = []
    columns = (items.counts, least, view.granted, items.fixed, items.input_counts)
    for now, low, granted, fixed, given in zip(*columns, strict=True):
        counts = geometric_schedule(now, low, layers * (granted - fixed), spans)
        if now and not counts:
            needed = math.ceil(fixed + (spans[0] * now + sum(spans[1:])) / layers)
            separators = f" and {fixed} separators" if fixed else ""
            raise BudgetError(
                f"a mean of {granted} of {given} visual tokens per layer cannot be met: the first {spans[0]} of "
                f"{layers} layers see {now} tokens{separators} before any is dropped; ask for at least {needed} tokens "
                f"(retention {math.ceil(1000 * needed / given) / 1000:.3f}), prune earlier or merge more"
            )
        left.append(tuple(counts) or (0,) * (len(spans) - 1))
    return tuple(left)


def geometric_schedule(tokens: int, keys: int, total: float, spans: Sequence[int]) -> list[int]:
    """Tokens left behind each stage, shrinking by a common factor, so that the layers see `total` of them together.

    tokens: before the first stage. keys: the least that any stage leaves. spans: layers in front of the first stage,
    between the stages and behind the last one. The result is ``max(keys, round(tokens * x ** s))`` for s = 1, 2, ...
    with the x in [0, 1] that comes closest. Where even x = 0 exceeds the total, fewer than `keys` are left, down to
    one; an empty list says that not even that is enough.

    >>> geometric_schedule(576, 47, 32 * 192, (3, 4, 4, 4, 17))
    [361, 226, 141, 88]
    """
    stages = range(1, len(spans))
    later = sum(spans[1:])
    room = (total - spans[0] * tokens) / later if later else 0.0
    if room < 0.5:
        return []
    least = min(tokens, max(1, min(keys, math.floor(room + 0.5))))

    def left(x: float) -> list[int]:
        return [max(least, math.floor(tokens * x**stage + 0.5)) for stage in stages]

    def excess(counts: list[int]) -> float:
        return spans[0] * tokens + sum(n * count for n, count in zip(spans[1:], counts, strict=True)) - total

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(left(middle)) <= 0 else (low, middle)
    return min(left(low), left(high), key=lambda counts: abs(excess(counts)))
