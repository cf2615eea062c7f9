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
from vtc.engine.encoder_call import EncoderCall
from vtc.engine.installed import Hook, MethodWrapper
from vtc.engine.taps import TapSet
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import Needs
from vtc.method.layout import Kind
from vtc.method.readings import AttentionCall, LayerOutput, VisionReading, exact

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter
    from vtc.engine.encoder_stages import EncoderStages
    from vtc.engine.sharing import Memo

MARK = "_vtc_context"


def context_of(output: Any) -> VisionContext | None:
    """The description attached to an encoder output, None where the output was made without an engine."""
    return getattr(output, MARK, None)


def _features(output: Any) -> Any:
    """A tensor that tells this output's features from all others."""
    features = getattr(output, "pooler_output", None)
    return features if isinstance(features, Tensor) or not features else features[0]


class _State(threading.local):
    """One thread's encoder calls: the one in progress, and the descriptions that a later forward pass can ask for.

    known: by features, no longer than those live. contexts: of the calls since the last look, gathered while a forward
    pass runs; before one, an output brings its description along.
    """

    def __init__(self) -> None:
        self.known: Any = WeakTensorKeyDictionary()
        self.contexts: list[VisionContext] = []
        self.gathering = False
        self.call: EncoderCall | None = None


class VisionRecorder:
    """Describes every encoder call of one model while installed.

    needs: what to record. stages: encoder stages to run, None for none. memo: where outputs are kept, so that later
    calls on the same pixels encode nothing.
    """

    def __init__(
        self, adapter: Adapter, needs: Needs, stages: EncoderStages | None = None, *, memo: Memo | None = None
    ) -> None:
        self.adapter, self.pairs, self.stages, self._memo = adapter, needs.vision_pairs, stages, memo
        self._state = _State()
        self._wrappers: list[MethodWrapper] = []
        self._hooks: list[Any] = []
        attention, taps = list(adapter.vision_attention), list[tuple[Any, Any]]()
        for layer, reading in self.pairs:
            if not 0 <= layer < len(attention):
                raise UnsupportedMethod(
                    f"vision layer {layer} was asked for; the encoder of this {adapter.family} model has layers 0 to "
                    f"{len(attention) - 1}; choose among them"
                )
            if not isinstance(reading, VisionReading):
                raise UnsupportedMethod(
                    f"{reading.name!r} was asked for of a vision layer, but is a reading of the LLM; write "
                    "Rows.RECEIVED, for example"
                )
            if reading.needs_cls and not adapter.spec.has_cls:
                raise UnsupportedMethod(
                    f"attention of the class token was asked for, but the encoder of this {adapter.family} model has "
                    "none; use Rows.RECEIVED"
                )
            if not isinstance(reading, LayerOutput):
                taps.append((attention[layer], functools.partial(self._tap, layer, reading)))
        self._taps = TapSet(taps)
        if stages is not None:
            stages.current = lambda: self._state.call
            stages.recorded = lambda call: {pair: self._joined(rows) for pair, rows in call.rows.items()}

    @property
    def contexts(self) -> list[VisionContext]:
        """Descriptions of the encoder calls inside the calling thread's forward pass."""
        return self._state.contexts

    @contexts.setter
    def contexts(self, contexts: list[VisionContext]) -> None:
        self._state.contexts = contexts

    def recall(self, output: Any) -> VisionContext | None:
        """The description of an encoder output, also where a wrapper rebuilt the object around the same tensors.

        accelerate does so when it moves the arguments of a call between devices.
        """
        features = _features(output)
        return context_of(output) or (self._state.known.get(features) if isinstance(features, Tensor) else None)

    # --- lifecycle
    def install(self) -> None:
        """Wrap the feature methods and place the taps."""
        self._taps.install()
        layers, backbone = list(self.adapter.vision_layers), self.adapter.backbone
        for layer, reading in self.pairs:
            if isinstance(reading, LayerOutput):
                hook = Hook(self._keep_output, layer, reading)
                self._hooks.append(layers[layer].register_forward_hook(hook))
        if self.stages is not None:
            self.stages.install()
        if self._memo is None:
            self._hooks.append(backbone.register_forward_pre_hook(Hook(self._gather, True)))
            self._hooks.append(backbone.register_forward_hook(Hook(self._gather, False), always_call=True))
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
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.stages is not None:
            self.stages.remove()
        self._taps.remove()
        self._state = _State()

    def _gather(self, begins: bool, *_: Any) -> None:
        """A forward pass of the backbone begins or ends."""
        if begins:
            self._state.contexts = []
        self._state.gathering = begins

    # --- the wrapper
    def _wrap(self, kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        inner = function if self.stages is None else _unshared(function)

        @functools.wraps(function, updated=())
        def features(*args: Any, **kwargs: Any) -> Any:
            if not self._wrappers:
                return function(*args, **kwargs)
            if self._state.call is not None:  # one modality's method may call the other's
                return inner(*args, **kwargs)
            if self._memo is None:
                return self._encode(kind, inner, args, kwargs)
            return self._memo.output(kind, inner, args, kwargs, self._encode)

        features._vtc_unshared = inner if self._memo is None else _unshared(function)  # type: ignore[attr-defined]
        return features

    def _encode(self, kind: Kind, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.pairs or self.stages is not None:
            self.adapter.check_call(bound(function, args, kwargs))
        call = EncoderCall()
        if self.stages is not None:
            self.stages.check(kind)
        self._state.call = call
        try:
            output = function(*args, **kwargs)
        finally:
            self._state.call = None
        if isinstance(output, tuple):
            return output
        context = context_of(output)
        if context is None:
            context = self.adapter.describe(kind, bound(function, args, kwargs), output)
            context.attention = {pair: context.pack(self._collect(call, *pair)) for pair in self.pairs}
            if self.stages is not None:
                context.alive = self.stages.alive(call, context)
            setattr(output, MARK, context)
        missing = sorted({layer for layer, _ in set(self.pairs) - set(context.attention)})
        if missing:
            raise UnsupportedCall(
                f"these features were encoded without the attention of vision layers {missing}; name every method that "
                "will be used when calling share_encoder"
            )
        if self._state.gathering:
            self._state.contexts.append(context)
        if self._memo is None and isinstance(features := _features(output), Tensor):
            self._state.known[features] = context
        return output

    @torch.no_grad()  # scores, not features: a graph would hold a whole attention matrix per layer
    def _tap(self, layer: int, reading: VisionReading, attention: AttentionCall) -> None:
        call = self._state.call
        if call is not None:
            with exact(attention.query.device):
                call.rows.setdefault((layer, reading), []).append(reading.read(attention))

    def _keep_output(self, layer: int, reading: VisionReading, module: Any, args: Any, output: Any) -> None:
        call = self._state.call
        if call is not None:
            hidden: Tensor = (output[0] if isinstance(output, tuple) else output).detach()
            call.rows.setdefault((layer, reading), []).append(hidden[None] if self.adapter.packed else hidden)

    def _joined(self, rows: list[Tensor]) -> Tensor:
        # A packed encoder calls attention segment by segment, [1, segment] each; any other crop by crop.
        return torch.cat(rows, dim=1 if self.adapter.packed else 0)

    def _collect(self, call: EncoderCall, layer: int, reading: VisionReading) -> Tensor:
        rows = call.rows.get((layer, reading))
        if not rows:
            raise UnsupportedMethod(
                f"vision layer {layer} did not run, the encoder stops before it; ask for layers up to "
                f"{self.adapter.spec.feature_layer}, whose output is the features"
            )
        values = self._joined(rows)
        return values if self.stages is None else self.stages.expand(call, layer, values)


def _unshared(function: Callable[..., Any]) -> Callable[..., Any]:
    """The feature method below what shares outputs: who changes the encoder has to run it."""
    unshared: Callable[..., Any] = getattr(getattr(function, "body", function), "_vtc_unshared", function)
    return unshared


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults left out, **kwargs flattened."""
    arguments = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    arguments.update(arguments.pop("kwargs", {}))
    return {name: value for name, value in arguments.items() if value is not None}
