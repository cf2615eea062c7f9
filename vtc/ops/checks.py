"""Whether the numbers that tokens are ranked by are numbers, asked only inside `checking`.

A NaN raises nothing by itself: it sorts to one end, and a method that computes nonsense keeps some tokens all the same.
Looking costs a host synchronisation, so nobody looks in the hot path; a caller who can afford it, for the first batch
of a method say, switches it on for its thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from vtc.errors import VTCError

_checked: ContextVar[str | None] = ContextVar("checked", default=None)


@contextmanager
def checking(name: str) -> Iterator[None]:
    """Inside this context `numbers` looks; `name` is who gets the blame."""
    token = _checked.set(name)
    try:
        yield
    finally:
        _checked.reset(token)


def numbers(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """`values` [I, N] or [I, N, D] as they are.

    mask: [I, N] bool, entries outside it may be anything. Raises VTCError inside `checking` if one of them is a NaN;
    infinities can be ranked and pass.

    >>> import torch
    >>> with checking("mine"):
    ...     numbers(torch.tensor([[0.5, torch.nan]]), torch.tensor([[True, False]])).tolist()
    [[0.5, nan]]
    """
    name = _checked.get()
    if name is not None:
        wrong = values.isnan()
        wrong = wrong.any(2) if wrong.ndim == 3 else wrong
        wrong = wrong if mask is None else wrong & mask
        if wrong.any():
            count, total = int(wrong.sum()), wrong.numel() if mask is None else int(mask.sum())
            raise VTCError(
                f"{name!r} ranks by numbers that are NaN ({count} of {total}), so what it keeps means nothing; mend "
                "its scores, or load the model in float32 or bfloat16 if the untouched model computes NaN as well"
            )
    return values
