"""NaN is an error: in the scores that a model picks its next tokens by, and in the numbers that a method ranks by.

A NaN raises nothing by itself. Greedy search over NaN picks token 0; a ranking sorts NaN to one end, and a method that
computes nonsense keeps some tokens all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vtc.errors import VTCError
from vtc.ops.checks import looking


class FiniteLogits:
    """A logits processor for `generate()` that changes nothing and notes, on the device, rows without a finite maximum.

    `check`, once after the call, reads the note.
    """

    def __init__(self) -> None:
        self._wrong: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [B, S]; scores: [B, V], -inf where a token is forbidden. Returns `scores`."""
        wrong = ~scores.amax(-1).isfinite()  # the maximum of a row with a NaN is NaN
        self._wrong = wrong if self._wrong is None else self._wrong | wrong
        return scores

    def check(self, what: str) -> None:
        """Raise VTCError if a row had none; `what` names the answers. Waits for the device."""
        if self._wrong is not None and (rows := int(self._wrong.sum())):
            raise VTCError(
                f"{what}: the model's scores for the next token are NaN or infinite in {rows} of {len(self._wrong)} "
                "rows, so its answers mean nothing; load it in float32 or bfloat16, or mend its weights"
            )


@contextmanager
def checking(name: str) -> Iterator[None]:
    """Raise VTCError where tokens are ranked by NaN in this context; `name` is the method that gets the blame.

    Every ranking waits for the device, so this is for the first batch of a method, not for all of them. Infinities can
    be ranked and pass, and so does whatever lies behind the end of an item.
    """

    def look(values: Tensor, mask: Tensor | None) -> None:
        wrong = values.isnan()
        wrong = wrong.any(2) if wrong.ndim == 3 else wrong
        wrong = wrong if mask is None else wrong & mask
        if wrong.any():
            count, total = int(wrong.sum()), wrong.numel() if mask is None else int(mask.sum())
            raise VTCError(
                f"{name!r} ranks by numbers that are NaN ({count} of {total}), so what it keeps means nothing; mend "
                "its scores, or load the model in float32 or bfloat16 if the untouched model computes NaN as well"
            )

    token = looking.set(look)
    try:
        yield
    finally:
        looking.reset(token)
