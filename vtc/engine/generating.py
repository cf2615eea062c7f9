"""What generate() of a model was given, and the tokens that part turns: how the end of the prompt is known."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from vtc.engine.installed import MethodWrapper


def control_tokens(model: Any) -> tuple[int, ...]:
    """Ids that begin a sequence or end a turn, from the configurations of a model."""
    config = model.config.get_text_config()
    found: dict[int, None] = {}
    for source in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id"):
            ids = getattr(source, name, None)
            for token in [ids] if isinstance(ids, int) else ids or ():
                found[token] = None
    return tuple(found)


class GenerateWatch:
    """Notes, per thread, what generate() of one model was given, so that drafts and answers are told from the prompt.

    Inside a nested call (a model that drafts for itself) the outer call's prompt counts.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._state = threading.local()
        self._wrapper: MethodWrapper | None = None

    def install(self) -> None:
        """Wrap generate() on the instance; models without one are left alone."""
        function = getattr(self._model, "generate", None)
        if function is not None:
            self._wrapper = MethodWrapper(self._model, "generate", self._noting(function))

    def remove(self) -> None:
        """Restore the instance."""
        if self._wrapper is not None:
            self._wrapper.remove()

    def limit(self, seen: int) -> int | None:
        """Columns of the coming chunk that are prompt, behind `seen` cached tokens; None outside generate()."""
        noted: tuple[int, bool] | None = getattr(self._state, "noted", None)
        if noted is None:
            return None
        length, whole = noted
        return max(0, length - seen) if whole else length

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        state = self._state

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            outer = getattr(state, "noted", None)
            state.noted = outer if outer is not None else _given(*args[:1], **kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                state.noted = outer

        return generate


def _given(
    inputs: Any = None, *, input_ids: Any = None, inputs_embeds: Any = None, **_: Any
) -> tuple[int, bool] | None:
    """Columns that generate() was given, and whether they begin with what its cache has seen already."""
    for value, whole in ((inputs_embeds, False), (inputs, True), (input_ids, True)):
        if isinstance(value, Tensor):
            return value.shape[1], whole
    return None
