"""`Handle`: what `vtc.compress` hands back."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vtc.batch.prompt import Lengths, Questions, Sizes, pixel_sizes, texts
from vtc.batch.trace import CallRecord, Stats
from vtc.errors import VTCError
from vtc.method.base import Compressor, Plan, Positions
from vtc.method.budget import Budget, ItemBudgets
from vtc.method.composite import Composite

if TYPE_CHECKING:
    from vtc.cost.shapes import PairShape
    from vtc.engine.encoder_engine import EncoderEngine
    from vtc.engine.engine import Engine


class Handle:
    """An attached method. Leave its `with` block or call `detach` to give the model back untouched.

    method, plan, budget, positions: what was attached, with every default resolved. stats: numbers of the calls.
    trace: one CallRecord per call that carried visual tokens (empty while tracing is off); it grows with the calls,
    so long-lived servers should attach with trace=False. errors: exceptions raised inside the engine, for callers
    that swallow them.

    >>> import vtc
    >>> from vtc.testing import tiny_inputs, tiny_model
    >>> model = tiny_model("llava-clip")
    >>> handle = vtc.compress(model, "random", keep=4)
    >>> output = model.generate(**tiny_inputs("llava-clip", [[3, "image", 5]], model=model), max_new_tokens=2)
    >>> handle.stats.calls[0].visual_tokens_in, handle.stats.calls[0].visual_tokens_kept
    ((16,), (4.0,))
    >>> handle.detach()
    >>> handle
    Handle(Random(scope='crop', seed=0), Budget(retention=None, keep=4), positions='compact')
    """

    def __init__(self, engine: Engine | EncoderEngine) -> None:
        self._engine = engine
        self._depth = 0

    @property
    def method(self) -> Compressor:
        """The method with its hyper-parameters."""
        return self._engine.method

    @property
    def plan(self) -> Plan:
        """Its stages and needs on this model."""
        return self._engine.plan

    @property
    def budget(self) -> Budget | ItemBudgets | None:
        """The budget asked for; of several methods the product of their retentions (None where counts are mixed in)."""
        method = self._engine.method
        return method.combined if isinstance(method, Composite) else self._engine.budget

    @property
    def positions(self) -> Positions:
        """The position policy in force."""
        return self._engine.positions

    @property
    def prompt_length(self) -> Lengths | None:
        """Tokens of every row that are the prompt, as given to `compress`; may be set anew between calls."""
        return self._engine.bounds.prompt_length

    @prompt_length.setter
    def prompt_length(self, lengths: Lengths | None) -> None:
        self._say(prompt_length=lengths)

    @property
    def system_length(self) -> Lengths | None:
        """Tokens of every row that are the system prompt, as given to `compress`; may be set anew between calls."""
        return self._engine.bounds.system_length

    @system_length.setter
    def system_length(self, lengths: Lengths | None) -> None:
        self._say(system_length=lengths)

    @property
    def image_sizes(self) -> Sizes | None:
        """Height and width of every picture, as given to `compress`; to be set anew when the pictures change."""
        return self._engine.bounds.image_sizes

    @image_sizes.setter
    def image_sizes(self, sizes: Sizes | None) -> None:
        self._say(image_sizes=pixel_sizes(sizes))

    @property
    def questions(self) -> Questions | None:
        """The text of every prompt, as given to `compress`; to be set anew when the prompts change."""
        return self._engine.bounds.questions

    @questions.setter
    def questions(self, questions: Questions | None) -> None:
        self._say(questions=texts(questions))

    @property
    def pairs(self) -> tuple[PairShape, ...]:
        """Sizes of the CLIP pairs that were loaded beside the model for the method."""
        return self._engine.pairs

    def _say(self, **said: Any) -> None:
        self._engine.bounds = dataclasses.replace(self._engine.bounds, **said)

    @property
    def stats(self) -> Stats:
        """Tokens, rows and seconds of every call so far."""
        return self._engine.stats

    @property
    def trace(self) -> list[CallRecord]:
        """Kept and merged tokens of every call so far."""
        return self._engine.trace

    @property
    def module(self) -> nn.Module | None:
        """The method's learned parts, None for training-free methods."""
        return self._engine.module

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """What the method added to the loss in the last forward pass; None where it adds nothing."""
        return self._engine.auxiliary_loss

    @property
    def errors(self) -> list[Exception]:
        """The last exceptions the engine raised, without their tracebacks."""
        return list(self._engine.errors)

    def detach(self) -> None:
        """Remove every hook; harmless when already detached."""
        self._engine.detach()

    def __enter__(self) -> Handle:
        if not self._engine.attached:
            raise VTCError("this handle was detached, its block would compress nothing; call vtc.compress again")
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:  # a block inside another of the same handle ends nothing
            self.detach()

    def __repr__(self) -> str:
        return f"Handle({self.method!r}, {self.budget}, positions={self.positions!r})"
