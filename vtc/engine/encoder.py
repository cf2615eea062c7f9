"""The encoder side: wrap get_image_features and get_video_features, describe their items, record attention rows.

Since transformers 5.20 generate() encodes images outside forward() and forgets pixels, sizes and grids afterwards, so
the feature methods themselves are wrapped on the backbone instance. The description travels on the returned output,
which survives beam expansion.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vtc.batch.context import VisionContext
from vtc.engine.encoder_pass import EncoderPass
from vtc.engine.installed import Hook, MethodWrapper
from vtc.engine.passes import Passes
from vtc.engine.recording import Recording
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import Needs
from vtc.method.layout import Kind
from vtc.method.readings import VisionReading

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter
    from vtc.engine.sharing import Memo
    from vtc.engine.tower_stages import TowerStages

MARK = "_vtc_context"


def context_of(output: Any) -> VisionContext | None:
    """The description attached to an encoder output, None where the output was made without an engine."""
    return getattr(output, MARK, None)


def _features(output: Any) -> Any:
    """A tensor that tells this output's features from all others."""
    features = getattr(output, "pooler_output", None)
    return features if isinstance(features, Tensor) or not features else features[0]


class _Known(threading.local):
    """One thread's descriptions by the features they belong to, no longer than those live."""

    def __init__(self) -> None:
        self.by_features: Any = WeakTensorKeyDictionary()


class VisionRecorder:
    """Describes every encoder call of one model while installed.

    needs: what to record. stages: encoder stages to run, None for none. encoded: told of every description
    and its output, returns what the caller gets. memo:
    where outputs are kept, so that later calls on the same pixels encode nothing.
    """

    def __init__(
        self,
        adapter: Adapter,
        needs: Needs,
        stages: TowerStages | None = None,
        *,
        encoded: Callable[[VisionContext, Any], Any] = lambda context, output: output,
        memo: Memo | None = None,
    ) -> None:
        self.adapter, self.pairs, self.stages, self._memo = adapter, needs.vision_pairs, stages, memo
        self._pooled = frozenset(kind for kind in adapter.modalities if needs.unpooled and adapter.pools(kind))
        if self._pooled and stages is not None:
            raise UnsupportedMethod(
                f"what the projector of this {adapter.family} model makes of every patch was asked for beside a method "
                "that removes patches inside the vision encoder; attach one of the two"
            )
        self._encoded, self._known = encoded, _Known()
        self._passes = Passes[EncoderPass]() if stages is None else stages.passes
        self._wrappers: list[MethodWrapper] = []
        self._hooks: list[Any] = []
        self._recording = Recording(adapter, self.pairs, self._passes)

    def recall(self, output: Any) -> VisionContext | None:
        """The description of an encoder output, also where a wrapper rebuilt the object around the same tensors.

        accelerate does so when it moves the arguments of a call between devices.
        """
        features = _features(output)
        return context_of(output) or (self._known.by_features.get(features) if isinstance(features, Tensor) else None)

    # --- lifecycle
    def install(self) -> None:
        """Wrap the feature methods and place the taps."""
        self._recording.install()
        if self._pooled:
            self._hooks.append(self.adapter.projector.register_forward_hook(Hook(self._keep_projected)))
        backbone = self.adapter.backbone
        if self.stages is not None:
            self.stages.install()
        for kind in self.adapter.modalities:
            name = f"get_{kind}_features"
            function = getattr(backbone, name, None)
            if function is not None:
                self._wrappers.append(MethodWrapper(backbone, name, self._wrap(kind, function)))

    def remove(self) -> None:
        """Restore the backbone and forget everything."""
        for wrapper in reversed(self._wrappers):
            wrapper.remove()
        self._wrappers = []
        if self.stages is not None:
            self.stages.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._recording.remove()
        self._known = _Known()

    # --- the wrapper
    def _wrap(self, kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        inner = function if self.stages is None else _unshared(function)

        @functools.wraps(function, updated=())
        def features(*args: Any, **kwargs: Any) -> Any:
            if not self._wrappers:
                return function(*args, **kwargs)
            if self._passes.current is not None:  # one modality's method may call the other's
                return inner(*args, **kwargs)
            if self._memo is None:
                return self._encode(kind, inner, args, kwargs)
            return self._memo.output(kind, inner, args, kwargs, self._encode)

        features._vtc_unshared = inner if self._memo is None else _unshared(function)  # type: ignore[attr-defined]
        return features

    def _encode(self, kind: Kind, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packing = None
        if self.pairs or self.stages is not None:
            arguments = bound(function, args, kwargs)
            self.adapter.check_call(arguments)
            packing = self.adapter.packing(kind, arguments)
        if self.stages is not None:
            self.stages.check(kind)
        one = self._passes.begin(EncoderPass(kind=kind, packing=packing))
        try:
            output = function(*args, **kwargs)
        finally:
            self._passes.end(one)
        if isinstance(output, tuple):
            return output
        context = context_of(output)
        if context is None:
            context = self.adapter.describe(kind, bound(function, args, kwargs), output)
            context.attention = {pair: context.pack(values) for pair, values in self._collect(one).items()}
            if kind in self._pooled:
                context.unpooled = torch.cat(one.projected).reshape(len(context.items), -1, one.projected[0].shape[-1])
            if self.stages is not None:
                context.alive, context.rows = self.stages.alive(one, context), one.shortened
            setattr(output, MARK, context)
        missing = sorted({layer for layer, _ in set(self.pairs) - set(context.attention)})
        if missing or (kind in self._pooled and context.unpooled is None):
            what = f"the attention of vision layers {missing}" if missing else "what the projector made of patches"
            raise UnsupportedCall(
                f"these features were encoded without {what}; name every method that will be used when calling "
                "share_encoder"
            )
        if self._memo is None and isinstance(features := _features(output), Tensor):
            self._known.by_features[features] = context
        return self._encoded(context, output)

    def _keep_projected(self, module: Any, args: Any, output: Tensor) -> None:
        one = self._passes.current
        if one is not None and one.kind in self._pooled:
            one.projected.append(output)

    def _collect(self, one: EncoderPass) -> dict[tuple[int, VisionReading], Tensor]:
        """What was recorded of all layers, for every patch that went in."""
        recorded = one.recorded(packed=self.adapter.packed)
        for layer in sorted({layer for layer, _ in set(self.pairs) - set(recorded)}):
            raise UnsupportedMethod(
                f"vision layer {layer} did not run, the encoder stops before it; ask for layers up to "
                f"{self.adapter.spec.feature_layer}, whose output is the features"
            )
        if self.stages is None:
            return recorded
        return {pair: self.stages.expand(one, pair[0], values) for pair, values in recorded.items()}


def _unshared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The feature method below what shares outputs: who changes the encoder has to run it."""
    unshared: Callable[..., Any] = getattr(getattr(function, "body", function), "_vtc_unshared", function)
    return unshared


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults left out, **kwargs flattened."""
    arguments = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    arguments.update(arguments.pop("kwargs", {}))
    return {name: value for name, value in arguments.items() if value is not None}
