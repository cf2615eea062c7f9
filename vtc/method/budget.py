"""The one place where a retention or a count becomes a number of tokens.

A budget is either `retention`, the fraction of each item's visual tokens that reaches the LLM, or `keep`, an absolute
count per item. For methods that prune inside the LLM both mean the *mean number of visual tokens entering the layers*,
so that 0.25 costs the same wherever a method acts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from vtc.errors import BudgetError, shown


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

    def tokens(self, count: int) -> int:
        """Tokens to keep of an item that has `count` of them; an item below the budget is kept whole."""
        if self.retention is not None:
            return tokens_to_keep(count, self.retention)
        assert self.keep is not None
        return min(count, self.keep)

    def tokens_from_layer(self, count: int, layer: int, layers: int) -> int:
        """Tokens to keep from LLM layer `layer` on, so that the mean entering all `layers` layers meets the budget.

        The first `layer` layers see all `count` tokens: ``layer * count + (layers - layer) * k = layers * budget``.
        Raises BudgetError when not even one token per later layer fits.

        >>> Budget(keep=192).tokens_from_layer(576, layer=2, layers=32)
        166
        """
        mean = self.tokens(count)
        if mean >= count or layer >= layers:
            return count
        exact = (layers * mean - layer * count) / (layers - layer)
        if exact < 0.5:
            least = math.ceil((layer * count + layers - layer) / layers)
            share = math.ceil(1000 * least / count) / 1000  # rounded up, so that it works when it is written
            raise BudgetError(
                f"a mean of {mean} of {count} visual tokens per layer cannot be met by pruning at layer {layer} of "
                f"{layers}: the layers before it already use more; ask for at least {least} tokens "
                f"(retention {share:.3f}) or prune earlier"
            )
        return min(count, max(1, math.floor(exact + 0.5)))
