"""The encoder side: wrap get_image_features and get_video_features, describe their items, record attention rows.

Since transformers 5.20 generate() encodes images outside forward() and forgets pixels, sizes and grids afterwards, so
the feature methods themselves are wrapped on the backbone instance. The description travels on the returned output,
which survives beam expansion.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.compressor import Compressor, Needs
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.layout import Kind, VisionContext
from vtc.readings import AttentionCall, LayerOutput, VisionReading, exact
from vtc.taps import TapSet

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter
    from vtc.encoder_stage import EncoderStages

MARK = "_vtc_context"


def context_of(output: Any) -> VisionContext | None:
    """The description attached to an encoder output, None where the output was made without an engine."""
    return getattr(output, MARK, None)


def _features(output: Any) -> Any:
    """A tensor that tells this output's features from all others."""
    features = getattr(output, "pooler_output", None)
    return features if isinstance(features, Tensor) or not features else features[0]


class _State(threading.local):
    """What one thread's encoder calls gathered: descriptions since the last look, rows of the call in progress.

    last: the latest features of each modality and their description.
    """

    def __init__(self) -> None:
        self.last: dict[Kind, tuple[weakref.ref[Any], VisionContext]] = {}
        self.contexts: list[VisionContext] = []
        self.rows: dict[tuple[int, VisionReading], list[Tensor]] = {}
        self.inside = False


class VisionRecorder:
    """Describes every encoder call of one model while installed.

    needs: what to record. stages: encoder stages to run, None for none. memo: keep outputs by the
    identity of the pixel tensors and the other arguments, so that later calls on the same encode nothing.
    """

    def __init__(
        self, adapter: Adapter, needs: Needs, stages: EncoderStages | None = None, *, memo: bool = False
    ) -> None:
        self.adapter, self.pairs, self.stages = adapter, needs.vision_pairs, stages
        self._state = _State()
        self._memo: dict[Any, tuple[Any, Any]] | None = {} if memo else None
        self._wrapped: list[tuple[str, Any, Any]] = []  # name, what lay on the backbone before, our wrapper
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
            stages.recorded = lambda: {pair: self._joined(rows) for pair, rows in self._state.rows.items()}

    @property
    def contexts(self) -> list[VisionContext]:
        """Descriptions of the calling thread's encoder calls."""
        return self._state.contexts

    @contexts.setter
    def contexts(self, contexts: list[VisionContext]) -> None:
        self._state.contexts = contexts

    def recall(self, output: Any) -> VisionContext | None:
        """The description of an encoder output, also where a wrapper rebuilt the object around the same tensors.

        accelerate does so when it moves the arguments of a call between devices.
        """
        features = _features(output)
        known = (context for last, context in self._state.last.values() if last() is features is not None)
        return context_of(output) or next(known, None)

    # --- lifecycle
    def install(self) -> None:
        """Wrap the feature methods and place the taps."""
        self._taps.install()
        layers = list(self.adapter.vision_layers)
        for layer, reading in self.pairs:
            if isinstance(reading, LayerOutput):
                hook = functools.partial(self._keep_output, layer, reading)
                self._hooks.append(layers[layer].register_forward_hook(hook))
        if self.stages is not None:
            self.stages.install()
        backbone = self.adapter.backbone
        for kind in self.adapter.modalities:
            name = f"get_{kind}_features"
            function = getattr(backbone, name, None)
            if function is not None:
                wrapper = self._wrap(kind, function)
                self._wrapped.append((name, backbone.__dict__.get(name), wrapper))
                backbone.__dict__[name] = wrapper

    def remove(self) -> None:
        """Restore the backbone and forget everything."""
        own = self.adapter.backbone.__dict__
        for name, before, wrapper in reversed(self._wrapped):
            wrapper._vtc_before = before
            if own.get(name) is not wrapper:
                continue  # wrapped over by a recorder still installed: ours passes through and goes with that one
            while hasattr(before, "_vtc_before"):
                before = before._vtc_before
            if before is None:
                del own[name]
            else:
                own[name] = before
        self._wrapped = []
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.stages is not None:
            self.stages.remove()
        self._taps.remove()
        self.clear()

    def clear(self) -> None:
        """Forget contexts and, with memo, the outputs kept so far."""
        self._state = _State()
        if self._memo is not None:
            self._memo = {}

    # --- the wrapper
    def _wrap(self, kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        inner = getattr(function, "_vtc_uncached", function) if self.stages is not None else function

        @functools.wraps(function)
        def features(*args: Any, **kwargs: Any) -> Any:
            if not self._wrapped:
                return function(*args, **kwargs)
            if self._state.inside:  # one modality's method may call the other's
                return inner(*args, **kwargs)
            if self._memo is None:
                return self._encode(kind, inner, args, kwargs)
            key, tensors = _identity(kind, inner, args, kwargs)
            if key not in self._memo:
                # The tensors are kept beside the output: a freed tensor's id could be given to another one.
                self._memo[key] = (self._encode(kind, inner, args, kwargs), tensors)
            kept = self._memo[key][0]
            output = copy.copy(kept)  # generate() expands the object in place under beams
            setattr(output, MARK, context_of(kept))
            return output

        features._vtc_uncached = inner if self._memo is None else function  # type: ignore[attr-defined]
        return features

    def _encode(self, kind: Kind, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.pairs or self.stages is not None:
            self.adapter.check_call(_bound(function, args, kwargs))
        self._state.inside, self._state.rows = True, {}
        try:
            if self.stages is not None:
                self.stages.begin(kind)
            output = function(*args, **kwargs)
        finally:
            self._state.inside = False
            if self.stages is not None:
                self.stages.end()
        if isinstance(output, tuple):
            return output
        context = context_of(output)
        if context is None:
            context = self.adapter.describe(kind, _bound(function, args, kwargs), output)
            context.attention = {pair: context.pack(self._collect(*pair)) for pair in self.pairs}
            if self.stages is not None:
                context.alive = self.stages.alive(context)
            setattr(output, MARK, context)
        missing = sorted({layer for layer, _ in set(self.pairs) - set(context.attention)})
        if missing:
            raise UnsupportedCall(
                f"these features were encoded without the attention of vision layers {missing}; name every method that "
                "will be used when calling share_encoder"
            )
        self.contexts.append(context)
        if (features := _features(output)) is not None:
            self._state.last[kind] = (weakref.ref(features), context)
        return output

    @torch.no_grad()  # scores, not features: a graph would hold a whole attention matrix per layer
    def _tap(self, layer: int, reading: VisionReading, call: AttentionCall) -> None:
        with exact(call.query.device):
            self._state.rows.setdefault((layer, reading), []).append(reading.read(call))

    def _keep_output(self, layer: int, reading: VisionReading, module: Any, args: Any, output: Any) -> None:
        hidden: Tensor = (output[0] if isinstance(output, tuple) else output).detach()
        hidden = hidden[None] if self.adapter.packed else hidden
        self._state.rows.setdefault((layer, reading), []).append(hidden)

    def _joined(self, rows: list[Tensor]) -> Tensor:
        # A packed encoder calls attention segment by segment, [1, segment] each; any other crop by crop.
        return torch.cat(rows, dim=1 if self.adapter.packed else 0)

    def _collect(self, layer: int, reading: VisionReading) -> Tensor:
        rows = self._state.rows.get((layer, reading))
        if not rows:
            raise UnsupportedMethod(
                f"vision layer {layer} did not run, the encoder stops before it; ask for layers up to "
                f"{self.adapter.spec.feature_layer}, whose output is the features"
            )
        values = self._joined(rows)
        return values if self.stages is None else self.stages.expand(layer, values)


def _identity(kind: Kind, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A key of one encoder call, tensors by identity and named arguments by value, and the tensors."""
    named = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    more = named.pop("kwargs", {})  # options of the forward call around it; only tensors among them concern the encoder
    key: list[Any] = [kind]
    tensors: list[Tensor] = []
    for name, value in sorted({**more, **named}.items()):
        parts = [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, Tensor)]
        key += [(name, id(part), _version(part), tuple(part.shape)) for part in parts]
        tensors += parts
        if name in named and value is not None and not parts:
            key.append((name, repr(value)))
    return tuple(key), tensors


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; tensors made under inference_mode keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def _bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults left out, **kwargs flattened."""
    arguments = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    arguments.update(arguments.pop("kwargs", {}))
    return {name: value for name, value in arguments.items() if value is not None}


class SharedEncoder:
    """Encode once, compress many times: see `vtc.share_encoder`. methods: all that will be attached meanwhile."""

    def __init__(self, adapter: Adapter, methods: Iterable[Compressor]) -> None:
        needs = functools.reduce(operator.or_, (method.plan(adapter.spec).needs for method in methods), Needs())
        self._recorder = VisionRecorder(adapter, needs, memo=True)

    def clear(self) -> None:
        """Forget the outputs kept so far; call it between batches."""
        self._recorder.clear()

    def __enter__(self) -> SharedEncoder:
        self._recorder.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.remove()
