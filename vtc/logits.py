"""Whether the scores that a model picked its next tokens by were numbers."""

from __future__ import annotations

from torch import Tensor

from vtc.errors import VTCError


class FiniteLogits:
    """A logits processor for `generate()` that changes nothing and notes, on the device, rows without a finite maximum.

    Greedy search over NaN picks token 0 and raises nothing. `check`, once after the call, reads the note.
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
