"""What lies on a model's modules for the time of a block. A copy or a pickle of the model goes without it.

Copies are made inside blocks by trainers (a reference model, an average of the weights) and by checkpoints of whole
models. A hook or a wrapper that went along would act on the modules of the model it was made for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _plain() -> Callable[..., None]:
    return _nothing


def _same(value: Any) -> Any:
    return value


def every_module(root: nn.Module) -> list[nn.Module]:
    """`root` and all below it, each once: `root.modules()` without their names, in a fraction of its time."""
    found = {id(root): root}
    queue = [root]
    while queue:
        for child in queue.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                queue.append(child)
    return list(found.values())


class Hook(functools.partial[Any]):
    """A forward hook; in a copy of its module a function that does nothing takes its place."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, ()


class MethodWrapper:
    """Stands on an instance in place of the method `name`; a copy of the instance gets that method, bound to itself.

    body: what runs instead. Wrappers lie over each other and may go in any order: one that is covered when it is
    removed stays until the one above it goes.
    """

    def __init__(self, owner: Any, name: str, body: Callable[..., Any]) -> None:
        functools.update_wrapper(self, body, updated=())
        self.body, self._owner, self._name = body, owner, name
        self._before: Any = owner.__dict__.get(name)
        self._removed = False
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def remove(self) -> None:
        """Put back what lay there before."""
        self._removed, own = True, self._owner.__dict__
        if own.get(self._name) is not self:
            return
        before = self._before
        while isinstance(before, MethodWrapper) and before._removed:
            before = before._before
        if before is None:
            del own[self._name]
        else:
            own[self._name] = before

    def __reduce__(self) -> tuple[Any, ...]:
        before = self._before
        while isinstance(before, MethodWrapper):
            before = before._before
        return (getattr, (self._owner, self._name)) if before is None else (_same, (before,))
