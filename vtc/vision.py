"""The encoder side: wrap get_image_features and get_video_features, describe their items, record attention rows.

Since transformers 5.20 generate() encodes images outside forward() and forgets pixels, sizes and grids afterwards, so
the feature methods themselves are wrapped on the backbone instance. The description travels on the returned output,
which survives beam expansion.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtc.compressor import Compressor, Rows
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.layout import Kind, VisionContext
from vtc.ops.attention import attention_received, attention_rows
from vtc.taps import AttentionCall, TapSet

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
        self.rows: dict[int, list[Tensor]] = {}
        self.inside = False


class VisionRecorder:
    """Describes every encoder call of one model while installed.

    needs: encoder layer -> rows to record. stages: encoder stages to run, None for none. memo: keep outputs by the
    identity of the pixel tensors and the other arguments, so that later calls on the same encode nothing.
    """

    def __init__(
        self, adapter: Adapter, needs: dict[int, Rows], stages: EncoderStages | None = None, *, memo: bool = False
    ) -> None:
        self.adapter, self.needs, self.stages = adapter, needs, stages
        self._state = _State()
        self._memo: dict[Any, tuple[Any, Any]] | None = {} if memo else None
        self._wrapped: list[tuple[str, Any, Any]] = []  # name, what lay on the backbone before, our wrapper
        attention = list(adapter.vision_attention)
        for layer, rows in needs.items():
            if not 0 <= layer < len(attention):
                raise UnsupportedMethod(
                    f"vision layer {layer} was asked for; the encoder of this {adapter.family} model has layers 0 to "
                    f"{len(attention) - 1}; choose among them"
                )
            if rows is Rows.CLS and not adapter.spec.has_cls:
                raise UnsupportedMethod(
                    f"attention of the class token was asked for, but the encoder of this {adapter.family} model has "
                    "none; use Rows.RECEIVED"
                )
        self._taps = TapSet(
            (attention[layer], functools.partial(self._tap, layer, rows)) for layer, rows in needs.items()
        )

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
            context.attention = {layer: context.pack(self._collect(layer)) for layer in self.needs}
            if self.stages is not None:
                context.alive = self.stages.alive(context)
            setattr(output, MARK, context)
        missing = sorted(set(self.needs) - set(context.attention))
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
    def _tap(self, layer: int, rows: Rows, call: AttentionCall) -> None:
        if rows is Rows.CLS:
            first = torch.zeros(call.query.shape[0], 1, dtype=torch.long, device=call.query.device)
            values = attention_rows(call.query, call.key, first, call.scaling, mask=call.mask)[:, 0]
        else:
            values = attention_received(call.query, call.key, call.scaling, mask=call.mask, segments=call.segments)
        self._state.rows.setdefault(layer, []).append(values)

    def _collect(self, layer: int) -> Tensor:
        rows = self._state.rows.get(layer)
        if not rows:
            raise UnsupportedMethod(
                f"vision layer {layer} did not run, the encoder stops before it; ask for layers up to "
                f"{self.adapter.spec.feature_layer}, whose output is the features"
            )
        # A packed encoder calls attention segment by segment, [1, segment] each; any other crop by crop.
        values = torch.cat(rows, dim=1 if self.adapter.packed else 0)
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
        needs: dict[int, Rows] = {}
        for method in methods:
            for layer, rows in method.plan(adapter.spec).needs.vision.items():
                if needs.setdefault(layer, rows) is not rows:
                    raise UnsupportedMethod(
                        f"{method.name!r} needs {rows.value!r} attention of vision layer {layer}, another method needs "
                        f"{needs[layer].value!r}; share the encoder between methods that agree"
                    )
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
