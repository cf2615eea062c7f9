"""Attention taps: read queries and keys in front of the registered attention function, leave the real call alone.

The function registered under a model's *active* implementation name is overridden by a wrapper that looks for a tap on
the calling module and then calls the original with the same arguments. Configuration, mask creation and kernel choice
stay what they are. (Registering a new name instead would also need a mask function: without one, transformers drops
causality and padding silently.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtc.errors import UnsupportedModel
from vtc.readings import AttentionCall

Tap = Callable[[AttentionCall], None]

_lock = threading.Lock()
_looking = threading.local()
_taps: dict[int, list[Tap]] = {}
_users: dict[str, int] = {}
_saved: dict[str, tuple[bool, Callable[..., Any]]] = {}


def _wrap(base: Callable[..., Any]) -> Callable[..., Any]:
    def tapped(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        taps = _taps.get(id(module))
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
            for tap in tuple(taps):
                tap(call)
        return base(module, query, key, value, attention_mask, *args, **kwargs)

    return tapped


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
    """Taps on several attention modules, installed and removed together.

    Raises UnsupportedModel for eager attention, whose function is not looked up in the registry.
    """

    def __init__(self, taps: Iterable[tuple[Any, Tap]]) -> None:
        self._entries = list(taps)
        self._names: list[str] = []
        for module, _ in self._entries:
            if module.config._attn_implementation in (None, "eager"):
                raise UnsupportedModel(
                    f"{type(module).__name__} runs eager attention, whose rows cannot be read beside the computation; "
                    "load the model with attn_implementation='sdpa'"
                )

    def install(self) -> None:
        """Put the taps in place."""
        with _lock:
            for module, tap in self._entries:
                _taps.setdefault(id(module), []).append(tap)
                name = module.config._attn_implementation
                if _users.get(name, 0) == 0:
                    base = ALL_ATTENTION_FUNCTIONS[name]
                    _saved[name] = (name in ALL_ATTENTION_FUNCTIONS._local_mapping, base)
                    ALL_ATTENTION_FUNCTIONS[name] = _wrap(base)
                _users[name] = _users.get(name, 0) + 1
                self._names.append(name)

    def remove(self) -> None:
        """Take them away again; the last user of an implementation restores the registry."""
        with _lock:
            for (module, tap), name in zip(self._entries, self._names, strict=False):
                taps = _taps[id(module)]
                taps.remove(tap)
                if not taps:
                    del _taps[id(module)]
                _users[name] -= 1
                if _users[name] == 0:
                    del _users[name]
                    was_local, base = _saved.pop(name)
                    if was_local:
                        ALL_ATTENTION_FUNCTIONS[name] = base
                    else:
                        del ALL_ATTENTION_FUNCTIONS[name]
            self._names = []
