"""`share_encoder`: encoder outputs kept by pixels, weights and mode, so that several methods share one encoding."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtc.engine.encoder import MARK, VisionRecorder, context_of
from vtc.method.base import Compressor, Needs
from vtc.method.layout import Kind

if TYPE_CHECKING:
    from vtc.adapters.base import Adapter

Encode = Callable[[Kind, Any, tuple[Any, ...], dict[str, Any]], Any]


class Memo:
    """Encoder outputs of one model, kept while neither the pixels nor the weights that made them change.

    Whether something changed is read from storage addresses, PyTorch's counts of in-place changes, and sums over all
    bits: `weight.data` changes, tensors made under inference_mode and memory shared with NumPy are not counted. Outputs
    that carry a gradient are not kept, because their graph serves one backward pass.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._weights: Any = None
        self._kept: dict[Any, tuple[Any, list[Tensor]]] = {}

    def clear(self) -> None:
        """Forget the outputs kept so far."""
        self._kept = {}

    def output(self, kind: Kind, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], encode: Encode) -> Any:
        """The output of an encoder call, from `encode(kind, function, args, kwargs)` where there is none yet."""
        weights = _state(self._outside(self._adapter.backbone))
        if weights != self._weights:
            self._weights, self._kept = weights, {}
        outputs = self._kept  # another thread may clear meanwhile
        key, tensors = _identity(kind, function, args, kwargs)
        kept = outputs.get(key)
        if kept is None:
            output = encode(kind, function, args, kwargs)
            if isinstance(output, tuple) or any(part.requires_grad for part in _parts(output.pooler_output)):
                return output
            # The tensors are kept beside the output: a freed tensor's id could be given to another one.
            kept = outputs[key] = (output, tensors)
        output = copy.copy(kept[0])  # generate() expands the object in place under beams
        setattr(output, MARK, context_of(kept[0]))
        return output

    def _outside(self, module: nn.Module) -> Iterator[nn.Module]:
        """`module` and what lies below it, without the language model."""
        if module is not self._adapter.language_model:
            yield module
            for child in module.children():
                yield from self._outside(child)


def _state(modules: Iterable[nn.Module]) -> Any:
    """What tells whether weights, buffers and modes are the same as at another time. Synchronises once per device."""
    state: list[Any] = []
    sums: dict[torch.device, list[Tensor]] = {}
    for module in modules:
        state.append(module.training)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or tensor.is_meta:  # accelerate makes another one for each call
                continue
            plain = type(tensor.detach()) is Tensor
            state.append((id(tensor), tensor.data_ptr() if plain else 0, _version(tensor)))
            if plain:
                sums.setdefault(tensor.device, []).append(checksum(tensor))
    return state, [torch.stack(found).tolist() for found in sums.values()]


def checksum(values: Tensor) -> Tensor:
    """The sum of all bits of a tensor of any shape and dtype, read as int64 numbers: an int64 scalar on its device.

    It changes with any single entry, not with the order of entries. A plain sum, so that it costs no more than reading
    the memory.
    """
    flat = values.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    bits = flat.view(torch.uint8)
    whole = bits.numel() // 8 * 8
    return bits[:whole].view(torch.int64).sum() + bits[whole:].sum()


def _parts(value: Any) -> list[Tensor]:
    return [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, Tensor)]


def _identity(kind: Kind, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """A key of one encoder call, tensors by identity and bits and named arguments by value, and the tensors."""
    named = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    more = named.pop("kwargs", {})  # options of the forward call around it; only tensors among them concern the encoder
    key: list[Any] = [kind, torch.is_grad_enabled(), torch.is_inference_mode_enabled()]
    tensors: list[Tensor] = []
    for name, value in sorted({**more, **named}.items()):
        parts = _parts(value)
        for part in parts:
            key.append((name, id(part), _version(part), tuple(part.shape), int(checksum(part))))
            device = part.device.type
            key.append((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
        tensors += parts
        if name in named and value is not None and not parts:
            key.append((name, repr(value)))
    return tuple(key), tensors


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; tensors made under inference_mode keep no count."""
    return 0 if tensor.is_inference() else tensor._version


class SharedEncoder:
    """Encode once, compress many times: see `vtc.share_encoder`. methods: all that will be attached meanwhile."""

    def __init__(self, adapter: Adapter, methods: Iterable[Compressor]) -> None:
        needs = functools.reduce(operator.or_, (method.plan(adapter.spec).needs for method in methods), Needs())
        self._memo = Memo(adapter)
        self._recorder = VisionRecorder(adapter, needs, memo=self._memo)

    def clear(self) -> None:
        """Forget the outputs kept so far; call it between batches."""
        self._memo.clear()

    def __enter__(self) -> SharedEncoder:
        self._recorder.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.remove()
        self._memo.clear()
