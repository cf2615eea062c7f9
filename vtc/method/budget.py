"""The one place where a retention or a count becomes numbers of tokens.

A budget is either `retention`, the fraction of each item's visual tokens that reaches the LLM, or `keep`, an absolute
count per item. For methods that prune inside the LLM both mean the *mean number of visual tokens entering the layers*,
so that 0.25 costs the same wherever a method acts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeVar

from vtc.errors import BudgetError, shown

STEPS = 50
"""Halvings of an interval: far below what moves a count. More of them would tell apart what rounding alone parts."""
CACHED = 4096
"""Solved budgets that are remembered: the items of a benchmark come in few sizes."""
NOISE = 1e-9
"""What rounding may have taken from a number that is whole."""


def tokens_to_keep(tokens: int, retention: float) -> int:
    """`retention` of `tokens`, rounded half up, at least one and at most `tokens`.

    Exact for every fraction k/n: ``tokens_to_keep(n, k / n) == k``.

    >>> tokens_to_keep(576, 1 / 9), tokens_to_keep(10, 0.05), tokens_to_keep(0, 0.5)
    (64, 1, 0)
    """
    return min(tokens, max(1, math.floor(tokens * retention + 0.5)))


@dataclass(frozen=True)
class Budget:
    """How many visual tokens of an item may be kept: exactly one of `retention` in (0, 1] and `keep` >= 1.

    >>> Budget(retention=0.25).tokens(576), Budget(keep=64).tokens(576), Budget(keep=64).tokens(16)
    (144, 64, 16)
    """

    retention: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if (self.retention is None) == (self.keep is None):
            given = "both" if self.retention is not None else "neither"
            raise BudgetError(
                f"{given} of retention and keep given; pass exactly one, for example retention=0.25 or keep=64"
            )
        retention, keep = self.retention, self.keep
        if retention is not None:
            if not isinstance(retention, Real) or isinstance(retention, bool) or not 0 < retention <= 1:
                raise BudgetError(
                    f"retention={shown(retention)} is outside (0, 1]; it is the fraction of visual tokens kept, "
                    "for example 0.25 (use keep=N for an absolute count)"
                )
            object.__setattr__(self, "retention", float(retention))  # numpy's numbers become Python's
        if keep is not None:
            if not isinstance(keep, Integral) or isinstance(keep, bool) or keep < 1:
                raise BudgetError(
                    f"keep={shown(keep)} is not a positive whole number of tokens per item, for example keep=64"
                )
            object.__setattr__(self, "keep", int(keep))

    def each(self, sources: Sequence[int]) -> tuple[Budget, ...]:
        """The budget of every item; sources: their numbers among what the encoder was given."""
        return (self,) * len(sources)

    def alike(self, method: str) -> Budget:
        """The budget of all items, as `method` needs it where pictures lie side by side in one tensor."""
        return self

    def tokens(self, count: int) -> int:
        """Tokens to keep of an item that has `count` of them; an item below the budget is kept whole."""
        if self.retention is not None:
            return tokens_to_keep(count, self.retention)
        assert self.keep is not None
        return min(count, self.keep)

    @functools.lru_cache(CACHED)  # noqa: B019 - a budget is two numbers
    def tokens_from_layer(self, count: int, layer: int, layers: int) -> int:
        """Tokens to keep from LLM layer `layer` on, so that the mean entering all `layers` layers meets the budget.

        The first `layer` layers see all `count` tokens: ``layer * count + (layers - layer) * k = layers * budget``.
        Raises BudgetError when not even one token per later layer fits.

        >>> Budget(keep=192).tokens_from_layer(576, layer=2, layers=32)
        166
        """
        mean, later = self.tokens(count), layers - layer
        if mean >= count or later <= 0:
            return count
        _, exact = spend(
            layers * mean, (layer, later), lambda x: [count, max(1.0, count * x)], of=count, slack=later / 2
        )
        return math.floor(exact + 0.5 + NOISE)

    def check_reach(self, least: float, layers: int, method: str) -> None:
        """Raise BudgetError for a retention that `least`, the share of the `layers` in front of a method, exceeds."""
        if self.retention not in (None, 1) and self.retention <= least:
            wanted = f"retention={self.retention} cannot be met by {method!r} here"
            raise _beyond(wanted, round(least * layers), layers, "every token", f"more than {least:.3f}")


@dataclass(frozen=True)
class ItemBudgets:
    """A budget of its own for every image and video of a call, in the order of the model's inputs, images first.

    >>> ItemBudgets.of(keep=[36, 144]).each([1, 0])
    (Budget(retention=None, keep=144), Budget(retention=None, keep=36))
    """

    budgets: tuple[Budget, ...]

    @classmethod
    def of(cls, retention: Sequence[float] | None = None, keep: Sequence[int] | None = None) -> ItemBudgets:
        """From exactly one list of numbers; raises BudgetError for anything else."""
        given = retention if keep is None else keep
        if not given or (retention is not None and keep is not None):
            raise BudgetError(
                f"retention={shown(retention)} and keep={shown(keep)} are no budgets of several items; pass one list, "
                "such as keep=[64, 144], with a value for each image and video of a call"
            )
        name = "retention" if keep is None else "keep"
        return cls(tuple(Budget(**{name: each}) for each in given))  # type: ignore[arg-type]

    def each(self, sources: Sequence[int]) -> tuple[Budget, ...]:
        """The budget of every item; sources: their numbers among what the encoder was given.

        Raises BudgetError where a call has another number of images and videos.
        """
        found = len(set(sources))
        if found != len(self.budgets):
            raise BudgetError(
                f"{len(self.budgets)} budgets for {found} images and videos of this call; give one for each of them, in"
                " the order of the model's inputs and images first, or a single one for all"
            )
        return tuple(self.budgets[source] for source in sources)

    def alike(self, method: str) -> Budget:
        """Raises BudgetError: pictures inside an encoder share one budget."""
        raise BudgetError(
            f"{len(self.budgets)} budgets for {method!r}, which acts inside the encoder here, where all pictures share "
            "one; give one number, or choose a method that acts behind the encoder"
        )

    def check_reach(self, least: float, layers: int, method: str) -> None:
        """As that of `Budget`, for each."""
        for each in self.budgets:
            each.check_reach(least, layers, method)


N = TypeVar("N", int, float)


def spend(
    total: float,
    spans: Sequence[int],
    curve: Callable[[float], list[N]],
    *,
    between: tuple[float, float] = (0.0, 1.0),
    fixed: float = 0,
    slack: float = 0.0,
    of: int | None = None,
) -> list[N]:
    """The point of `curve` at which the layers of an LLM see `total` tokens together: one number for each span.

    spans: numbers of neighbouring layers that see the same tokens, from the first layer on. curve: its one parameter ->
    tokens that each span sees; none falls where the parameter rises within `between`. fixed: tokens beside them that
    all layers see and that count. Of the two points nearest to the total the closer one, of equals the lower.

    Raises BudgetError where the curve's lowest point exceeds the total by more than `slack`, what rounding to whole
    tokens may cost; of: tokens of the item in the input, for the message.

    >>> spend(32 * 192, (2, 30), lambda x: [576, round(576 * x)])
    [576, 166]
    """
    layers = sum(spans)

    def excess(counts: list[N]) -> float:
        return sum(span * count for span, count in zip(spans, counts, strict=True)) + layers * fixed - total

    low, high = between
    least = curve(low)
    if excess(least) > slack:
        needed = math.ceil((excess(least) + total) / layers)
        mean, more = f"{total / layers:.6g}", f"at least {needed} tokens"
        if of is not None:
            mean, more = f"{mean} of {of}", f"{more} (retention {math.ceil(1000 * needed / of) / 1000:.3f})"
        seen = f"{least[0]:g} tokens" + (f" and {fixed:g} separators" if fixed else "")
        raise _beyond(f"a mean of {mean} visual tokens per layer cannot be met", spans[0], layers, seen, more)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(curve(middle)) <= 0 else (low, middle)
    return min(curve(low), curve(high), key=lambda counts: abs(excess(counts)))


Shape = Callable[[float, Sequence[int]], list[float]]
"""x in [0, 1] and the spans of layers -> the share of an item's tokens that each stage leaves, none falling with x."""


def common_factor(x: float, spans: Sequence[int]) -> list[float]:
    """Every stage leaves the share x of what the one before it left.

    >>> common_factor(0.5, (8, 8, 8, 8))
    [0.5, 0.25, 0.125]
    """
    return [x**stage for stage in range(1, len(spans))]


@functools.lru_cache(CACHED)
def left_by_stages(
    tokens: int,
    least: int,
    granted: int,
    fixed: int,
    given: int,
    spans: tuple[int, ...],
    shape: Shape = common_factor,
) -> tuple[int, ...]:
    """Tokens of an item left behind each stage in the LLM, in shares of the given shape, so that the budget is met.

    tokens: in front of the first stage, beside `fixed` separators. least: what a stage leaves at least. granted: mean
    over the layers, separators included, of the `given` tokens in the input. spans: layers in front of the first stage,
    between the stages and behind the last one. The result is ``max(least, round(tokens * share))``, with the shares of
    the x in [0, 1] that comes closest. Where even x = 0 exceeds the budget, fewer than `least` are left, down to one;
    raises BudgetError where not even that is enough.

    >>> left_by_stages(576, 47, 192, 0, 576, (3, 4, 4, 4, 17))
    (361, 226, 141, 88)
    """
    if not tokens:
        return (0,) * (len(spans) - 1)
    first, later, total = spans[0], sum(spans[1:]), sum(spans) * granted
    room = (total - sum(spans) * fixed - first * tokens) / later
    lowest = min(tokens, max(1, min(least, math.floor(room + 0.5))))

    def curve(x: float) -> list[int]:
        return [tokens, *(max(lowest, math.floor(tokens * share + 0.5)) for share in shape(x, spans))]

    return tuple(spend(total, spans, curve, fixed=fixed, slack=later / 2, of=given)[1:])


def _beyond(wanted: str, first: int, layers: int, seen: str, more: str) -> BudgetError:
    return BudgetError(
        f"{wanted}: {first} of {layers} LLM layers see {seen} before any is dropped; ask for {more}, prune earlier or "
        "merge more"
    )
