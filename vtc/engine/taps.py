"""Attention taps: read queries and keys in front of the registered attention function, leave the real call alone.

The function registered under a model's *active* implementation name is overridden by a wrapper that looks for a tap on
the calling module and then calls the original with the same arguments. Configuration, mask creation and kernel choice
stay what they are. (Registering a new name instead would also need a mask function: without one, transformers drops
causality and padding silently.)
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtc.errors import UnsupportedModel
from vtc.method.readings import AttentionCall

Tap = Callable[[AttentionCall], None]

_lock = threading.Lock()
_looking = threading.local()
_taps: dict[int, tuple[weakref.ref[TapSet], ...]] = {}
"""By id of the attention module. Weak, so that a model dropped while tapped is freed, its taps with it."""
_dropped: deque[tuple[weakref.ref[TapSet], Sequence[tuple[int, str]]]] = deque()
_users: dict[str, int] = {}
_saved: dict[str, tuple[bool, Callable[..., Any]]] = {}
_wrappers: dict[str, Callable[..., Any]] = {}
"""By name what was registered last; one under a function that somebody registered later only passes on."""


def _wrap(name: str) -> None:
    base = ALL_ATTENTION_FUNCTIONS[name]

    def tapped(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        sets = _taps.get(id(module)) if _wrappers.get(name) is tapped else None
        taps = [tap for ref in sets if (found := ref()) for tap in found.of(module)] if sets else ()
        if taps:
            scaling = kwargs.get("scaling")
            causal = kwargs.get("is_causal")
            call = AttentionCall(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                bool(getattr(module, "is_causal", False) if causal is None else causal),
                kwargs.get("cu_seq_lens_q"),
            )
            if getattr(_looking, "ahead", False):
                raise _Seen(call)
            for tap in taps:
                tap(call)
        return base(module, query, key, value, attention_mask, *args, **kwargs)

    _saved[name] = (name in ALL_ATTENTION_FUNCTIONS._local_mapping, base)
    _wrappers[name] = ALL_ATTENTION_FUNCTIONS[name] = tapped


class _Seen(Exception):
    """Ends an attention module's forward pass in front of its attention function."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


def look_ahead(attention: Any, hidden: Tensor, rotary: Any) -> AttentionCall:
    """The queries and keys that a tapped module makes of `hidden` [B, L, D]; nothing is attended and nothing cached.

    rotary: the position embeddings that the module takes. Other taps on it do not notice.
    """
    _looking.ahead = True
    try:
        attention(hidden_states=hidden, position_embeddings=rotary, attention_mask=None, past_key_values=None)
    except _Seen as seen:
        return seen.call
    finally:
        _looking.ahead = False
    raise UnsupportedModel(
        f"{type(attention).__name__} ran without looking its attention function up, so its queries and keys cannot be "
        "read; load the model with attn_implementation='sdpa'"
    )


class TapSet:
    """Taps on several attention modules, installed and removed together; to be kept by whoever installed it.

    A set that is dropped with its model goes without being removed. Raises UnsupportedModel for eager attention, whose
    function is not looked up in the registry.
    """

    def __init__(self, taps: Iterable[tuple[Any, Tap]]) -> None:
        self._entries = list(taps)
        self._by_module: dict[int, list[Tap]] = {}
        self._finalizer: weakref.finalize[Any, Any] | None = None
        for module, tap in self._entries:
            self._by_module.setdefault(id(module), []).append(tap)
            if module.config._attn_implementation in (None, "eager"):
                raise UnsupportedModel(
                    f"{type(module).__name__} runs eager attention, whose rows cannot be read beside the computation; "
                    "load the model with attn_implementation='sdpa'"
                )

    def of(self, module: Any) -> list[Tap]:
        """The taps on one module."""
        return self._by_module.get(id(module), [])

    def install(self) -> None:
        """Put the taps in place."""
        if not self._entries:
            return
        mine, modules = weakref.ref(self), {id(module): module for module, _ in self._entries}
        places = [(key, str(module.config._attn_implementation)) for key, module in modules.items()]
        with _lock:
            _sweep()
            for key, name in places:
                _taps[key] = (*_taps.get(key, ()), mine)
                if ALL_ATTENTION_FUNCTIONS[name] is not _wrappers.get(name):
                    _wrap(name)
                _users[name] = _users.get(name, 0) + 1
        self._finalizer = weakref.finalize(self, _drop, mine, places)
        self._finalizer.atexit = False

    def remove(self) -> None:
        """Take them away again; the last user of an implementation restores the registry."""
        if self._finalizer is not None:
            self._finalizer()
            with _lock:
                _sweep()


def _drop(mine: weakref.ref[TapSet], places: Sequence[tuple[int, str]]) -> None:
    """Give a set up. The garbage collector may call this anywhere, also while this thread holds the lock."""
    _dropped.append((mine, places))
    if _lock.acquire(blocking=False):
        try:
            _sweep()
        finally:
            _lock.release()


def _sweep() -> None:
    """Forget the sets given up; the caller holds the lock."""
    while _dropped:
        mine, places = _dropped.popleft()
        for key, name in places:
            _taps[key] = tuple(ref for ref in _taps[key] if ref is not mine)
            if not _taps[key]:
                del _taps[key]
            _users[name] -= 1
            if _users[name] == 0:
                del _users[name]
                was_local, base = _saved.pop(name)
                if ALL_ATTENTION_FUNCTIONS[name] is not _wrappers.pop(name):
                    continue  # somebody registered another over it
                if was_local:
                    ALL_ATTENTION_FUNCTIONS[name] = base
                else:
                    del ALL_ATTENTION_FUNCTIONS[name]
