"""Functions replaced for some threads and for a while: nothing is left behind, in whatever order the users end.

`mock.patch` puts back what it found, which is another user's replacement where two threads overlap.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Function = Callable[..., Any]
Layer = Callable[[Function], Function]
"""Makes the replacement from the function below it."""


class Mine:
    """Whether the running thread is the one that made this object, or was started since."""

    def __init__(self) -> None:
        self._others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def __call__(self) -> bool:
        return threading.get_ident() not in self._others


@dataclass
class _Spot:
    """One attribute of a module or class, with what lies on it; `own` is False where a base class defines it."""

    original: Function
    own: bool
    layers: list[Layer] = field(default_factory=list)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        function = self.original
        for layer in list(self.layers):
            function = layer(function)
        return function(*args, **kwargs)


_lock = threading.RLock()
_spots: dict[tuple[int, str], _Spot] = {}


@contextmanager
def replaced(owner: Any, name: str, layer: Layer, mine: Mine) -> Iterator[None]:
    """Inside, calls of the attribute `name` of a module or class from threads that are `mine` go through the `layer`.

    Layers of several users lie on one another, the latest on top. The attribute is what it was when the last one ends.
    """

    def selective(below: Function) -> Function:
        return layer(below) if mine() else below

    key = (id(owner), name)
    with _lock:
        spot = _spots.get(key)
        if spot is None:
            spot = _spots[key] = _Spot(getattr(owner, name), name in vars(owner))
            setattr(owner, name, lambda *args, **kwargs: spot.call(*args, **kwargs))  # a function, so that it binds
        spot.layers.append(selective)
    try:
        yield
    finally:
        with _lock:
            spot.layers.remove(selective)
            if not spot.layers:
                del _spots[key]
                setattr(owner, name, spot.original) if spot.own else delattr(owner, name)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Inside, these environment variables read as `values`, for this thread and those it starts alone."""

    def layer(below: Function) -> Function:
        return lambda environ, key: values[key] if key in values else below(environ, key)

    with replaced(type(os.environ), "__getitem__", layer, Mine()):
        yield
