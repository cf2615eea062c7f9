"""Copies of a model made while a method is attached: plain models, to which nothing is attached.

Trainers copy a model for reference or for an average of its weights. Every module that carries something of this
library therefore says, for as long as it does, how it is copied without it. Pickling is refused: transformers' own
hooks cannot be pickled once a model has run, and a shallow copy would share the hooked modules.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from types import FunctionType, MethodType, NoneType
from typing import Any

from torch import nn

from vtc.engine.installed import every_module
from vtc.errors import VTCError

PACKAGE = __name__.partition(".")[0]
COPY, REDUCE = "__deepcopy__", "__reduce_ex__"
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
KWARGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


PLAIN = frozenset((dict, OrderedDict, set, bool, int, float, str, tuple, NoneType))
"""Types of what most attributes of a module are, so that marking a large model takes no time."""


WRAPPERS = (functools.partial, FunctionType, MethodType)
"""Types of what may be a hook; of everything else the type alone tells whose it is."""


def _ours(value: Any) -> bool:
    """True for a hook, a wrapper or an object of this library."""
    kind = type(value)
    if kind in PLAIN:
        return False
    if not issubclass(kind, WRAPPERS):
        return _own_name(kind.__module__)
    while True:
        inner = value.func if isinstance(value, functools.partial) else getattr(value, "__func__", None)
        if inner is None:
            break
        value = inner
    # A wrapper takes over the name and module of what it wraps, but not its globals.
    return _own_name(value.__globals__.get("__name__") if isinstance(value, FunctionType) else type(value).__module__)


def _own_name(home: Any) -> bool:
    return isinstance(home, str) and home.split(".")[0] == PACKAGE


def _clean(module: nn.Module) -> dict[str, Any]:
    """The state of `module` for a copy: without hooks and attributes of this library."""
    state: dict[str, Any] = type(module).__getstate__(module)  # type: ignore[no-untyped-call]
    for name in HOOKS:
        kept = {key: hook for key, hook in state[name].items() if not _ours(hook)}
        gone = set(state[name]) - set(kept)
        state[name] = type(state[name])(kept)
        for other in KWARGS:
            if gone and other in state:
                state[other] = type(state[other])((k, v) for k, v in state[other].items() if k not in gone)
    return {name: value for name, value in state.items() if name not in (COPY, REDUCE) and not _ours(value)}


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without what this library put on the module."""
    made = memo[id(module)] = type(module).__new__(type(module))
    made.__setstate__(copy.deepcopy(_clean(module), memo))  # type: ignore[no-untyped-call]
    return made


def _refuse(module: nn.Module, protocol: int) -> Any:
    raise VTCError(
        f"this {type(module).__name__} has a compression method attached and cannot be pickled or copied shallowly; "
        "save model.state_dict() or call save_pretrained, use copy.deepcopy, or leave the `with` block first"
    )


class CopyGuard:
    """Keeps copies of one model clean while installed; install it after everything else, remove it first."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []

    def install(self) -> None:
        """Mark every module that carries something."""
        for module in every_module(self._model):
            own = vars(module)
            hooks = [hook for name in HOOKS if own[name] for hook in own[name].values()]
            if not hooks and PLAIN.issuperset(map(type, own.values())):
                continue
            if COPY not in own and any(map(_ours, [*hooks, *own.values()])):
                own |= {COPY: functools.partial(_copy, module), REDUCE: functools.partial(_refuse, module)}
                self._modules.append(module)

    def remove(self) -> None:
        """Take the marks away."""
        for module in self._modules:
            for name in (COPY, REDUCE):
                vars(module).pop(name, None)
        self._modules = []
