"""Where the time of a request goes: marks at the seams of an unmodified model, which change nothing of what runs.

| part | from, to |
|---|---|
| picture | bytes of files to upright RGB pictures |
| processor | scaling, chat template, tokens, tensors on the device |
| vision | the family's feature method: tower, projector, and what a method reads or drops in there |
| selection | what the engine does in front of the language model, of layers at which it acts, and at the end |
| prefill | the language model's first pass without the selection; what a method reads inside layers is in here |
| decode | from the first new token to the last |
| other | the rest of `generate`: embeddings, logits, choice of tokens |

`first_token` is the time until the first new token is known, `total` the whole; the parts add up to the latter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.adapters.base import Adapter
from vtc.engine.handle import Handle
from vtc.engine.installed import MethodWrapper
from vtc.eval.bench.clock import Clock, Mark

PARTS = ("picture", "processor", "vision", "selection", "prefill", "decode", "other")
"""They add up to `total`."""
Span = tuple[Mark, Mark]


class Seams:
    """Marks of one request. Install it when the method is attached already, so that it lies around the engine."""

    def __init__(self, adapter: Adapter, clock: Clock, handle: Handle | None = None) -> None:
        self.clock = clock
        self.spans: dict[str, list[Span]] = {"vision": [], "selection": [], "passes": []}
        self.tokens: list[Mark] = []
        self._done = self._inside = False
        self._entered: Mark = None
        self._hooks: list[Any] = []
        self._wrappers: list[MethodWrapper] = []
        self._install(adapter, handle)

    def _install(self, adapter: Adapter, handle: Handle | None) -> None:
        for kind in adapter.modalities:
            name = f"get_{kind}_features"
            if (function := getattr(adapter.backbone, name, None)) is not None:
                self._wrappers.append(MethodWrapper(adapter.backbone, name, self._vision(function)))
        model: Any = adapter.language_model
        if handle is not None:
            self._around(model.register_forward_pre_hook)
            self._around(model.register_forward_hook)
            for stage in handle.plan.stages:
                if isinstance(stage, int) and stage > 0:
                    layer: Any = adapter.layers[stage]
                    self._around(layer.register_forward_pre_hook)
        self._hooks.append(model.register_forward_pre_hook(self._enter, prepend=True))
        self._hooks.append(model.register_forward_hook(self._leave))

    def _around(self, register: Callable[..., Any]) -> None:
        """Marks in front of and behind the hooks that the engine has there."""
        begun: list[Mark] = []

        def before(*_: Any) -> None:
            if not self._done:
                begun.append(self.clock.mark())

        def after(*_: Any) -> None:
            if not self._done:
                self.spans["selection"].append((begun.pop(), self.clock.mark()))

        self._hooks += [register(before, prepend=True), register(after)]

    def remove(self) -> None:
        """Take all marks off the model."""
        for hook in self._hooks:
            hook.remove()
        for wrapper in reversed(self._wrappers):
            wrapper.remove()

    def _vision(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())  # generate() reads its signature
        def features(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # one modality's method may call the other's
                return function(*args, **kwargs)
            self._inside, begun = True, self.clock.mark()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.spans["vision"].append((begun, self.clock.mark()))

        return features

    def _enter(self, *_: Any) -> None:
        if not self._done:
            self._entered = self.clock.mark()

    def _leave(self, *_: Any) -> None:
        if not self._done:
            self.spans["passes"].append((self._entered, self.clock.mark()))
            self._done = True

    def token(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion of `generate` that stops nothing: it marks when the new tokens are known."""
        self.tokens.append(self.clock.mark())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def seconds(self, name: str) -> float:
        """The time of all spans of that name."""
        return sum(self.clock.seconds(start, end) for start, end in self.spans[name])
