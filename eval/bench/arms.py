"""What is measured against each other: the untouched model, methods at retentions, smaller pictures, and the limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vtc.errors import InputError
from vtc.eval.downsample import DOWNSAMPLE
from vtc.method.base import Compressor
from vtc.method.budget import Budget
from vtc.method.text import attachable, parse, seeded

UNTOUCHED = "untouched"
Kind = Literal["untouched", "method", "downsample", "limit"]


@dataclass(frozen=True)
class Arm:
    """One way to answer. budget: as asked for; None where nothing is dropped, or the method decides.

    tokens: visual tokens of a limit's prompt; of others None.
    """

    name: str
    kind: Kind
    method: str = ""
    budget: Budget | None = None
    tokens: int | None = None
    compressor: Compressor | None = field(default=None, compare=False, repr=False)

    @property
    def limits(self) -> dict[str, float | int | None]:
        """The budget as arguments of `vtc.compress`; a composite holds its parts' own."""
        takes = self.compressor is not None and self.compressor.needs_budget and self.budget is not None
        return vars(self.budget) if takes else {}


def limit(tokens: int) -> Arm:
    """The same language model on a prompt that has so few visual tokens from the start."""
    return Arm(f"limit at {tokens} tokens", "limit", tokens=tokens)


def arms(methods: Sequence[str], retentions: Sequence[float]) -> list[Arm]:
    """The untouched model, and each method at each retention, or at its own budget; none of them twice.

    Raises:
        InputError: a method that cannot be read, or that has no budget where there are no retentions.
        VTCError: a method, hyper-parameter or budget that is unknown or refused.
    """
    found = [Arm(UNTOUCHED, "untouched"), *(arm for text in methods for arm in _of(text.strip(), retentions))]
    return list({arm.name: arm for arm in found}.values())


def _of(text: str, retentions: Sequence[float]) -> Iterator[Arm]:
    entries = parse(text)
    if len(entries) != 1:
        raise InputError(f"method {text!r} is a list of {len(entries)}; write one method in each entry")
    parts = entries[0]
    control = len(parts) == 1 and parts[0].name == DOWNSAMPLE
    if control and parts[0].parameters:
        raise InputError(f"{text!r}: {DOWNSAMPLE} has no hyper-parameters; write {DOWNSAMPLE}")
    own = any(part.budget is not None for part in parts)
    takes = control or any(seeded(part.name, part.parameters, None).needs_budget for part in parts)
    if takes and not own and not retentions:
        raise InputError(f"method {text!r} has no budget; give --retentions, or one of its own: {text}@0.25")
    for share in retentions if takes and not own else (None,):
        name = text if share is None else f"{text}@{share:g}"
        if control:
            yield Arm(name, "downsample", text, parts[0].budget or Budget(share))
        else:
            method, limits = attachable(text, {}, retention=share)
            given = any(value is not None for value in limits.values())
            yield Arm(name, "method", text, Budget(**limits) if given else None, compressor=method)
