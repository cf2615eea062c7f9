"""A dictionary with manners: lazy entries, third-party entry points, near matches for unknown names."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, TypeVar, dataclass_transform

from vtc.errors import UnknownName, VTCError, one_line, shown, unknown_name
from vtc.method.base import Compressor

M = TypeVar("M", bound=Compressor)

GROUP = "vtc.methods"


class MethodRegistry:
    """Maps method names to Compressor classes: one module per method in `vtc.methods`, plus `vtc.methods` entry points.

    A class registered by hand wins over nothing: names are unique and a second registration raises.
    """

    def __init__(self) -> None:
        self._classes: dict[str, type[Compressor]] = {}
        self._scanned = False

    def register(self, cls: type[M]) -> type[M]:
        """Add a class under its `name` and make it a frozen dataclass, unless it is a dataclass already.

        Raises VTCError for a name that is taken or that nobody could write, and for a class that makes no method.
        """
        if not isinstance(cls, type) or not issubclass(cls, Compressor):
            raise VTCError(f"{shown(cls)} is no class of methods; derive one from vtc.Compressor")
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise VTCError(
                f"{cls.__qualname__} has name={shown(name)}; write a class variable such as name: ClassVar[str] = "
                '"my_method", of letters, digits, "_", "-" and "."'
            )
        if missing := sorted(cls.__abstractmethods__):
            raise VTCError(f"{cls.__qualname__} is abstract; write its {' and '.join(missing)}")
        known = self._classes.get(cls.name)
        if known is not None and known is not cls:
            raise VTCError(
                f"method name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; choose another"
            )
        if "__dataclass_fields__" not in vars(cls):  # is_dataclass() would see the base class
            try:
                dataclasses.dataclass(frozen=True)(cls)
            except (TypeError, ValueError) as error:  # a default that may change, a field without one behind others
                reason = re.sub(r"<class '(\S+)'>", r"\1", one_line(error))
                raise VTCError(
                    f"{cls.__qualname__} cannot become a dataclass: {reason}; write its hyper-parameters as "
                    "fields with defaults that do not change, such as layers: tuple[int, ...] = (2, 6)"
                ) from None
        self._classes[cls.name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Remove a name, as tests of third-party methods need it."""
        del self._classes[self.get(name).name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._scan()
        return sorted(self._classes)

    def get(self, name: str) -> type[Compressor]:
        """The class behind `name`; UnknownName lists near matches."""
        self._scan()
        if not isinstance(name, str) or name not in self._classes:
            raise unknown_name("method", name, self._classes)
        return self._classes[name]

    def create(self, name: str, **hyper_parameters: Any) -> Compressor:
        """Build a method; a hyper-parameter it does not have raises UnknownName with near matches."""
        cls, fields = self.get(name), self.parameters(name)
        for given in hyper_parameters:
            if given not in fields:
                raise unknown_parameter(name, given, fields)
        return cls.from_options(**hyper_parameters)

    def parameters(self, name: str) -> list[str]:
        """Names of the hyper-parameters of the method `name`."""
        return [f.name for f in dataclasses.fields(self.get(name)) if f.init]

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module("vtc.methods")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"vtc.methods.{module.name}")
        for point in entry_points(group=GROUP):
            try:
                self.register(point.load())
            except Exception as error:
                self._scanned = False  # the next call must not pass over it in silence
                raise VTCError(
                    f"the entry point {point.value!r} of group {GROUP!r} cannot be loaded ({error}); "
                    "fix or uninstall the package that provides it"
                ) from error


def unknown_parameter(method: str, given: str, known: Iterable[str], also: Iterable[str] = ()) -> UnknownName:
    """The error for a hyper-parameter that a method does not have; `also` as in `unknown_name`."""
    kind = f"hyper-parameter of {method!r}"
    return UnknownName(str(unknown_name(kind, given, known, also)).replace(f"Known {kind}s", "Known hyper-parameters"))


METHODS = MethodRegistry()


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def register(cls: type[M]) -> type[M]:
    """Class decorator: makes a frozen dataclass of a method and adds it under its `name`, by default in snake_case.

    Raises VTCError for a name that is taken or that nobody could write, and for a class that makes no method.

    >>> import vtc
    >>> @vtc.register
    ... class KeepFirst(vtc.ScoringCompressor):
    ...     power: float = 2.0
    ...     def score(self, view):
    ...         return -view.items.token.float() ** self.power
    >>> vtc.create("keep_first", power=3)
    KeepFirst(scope='item', power=3.0)
    >>> METHODS.unregister("keep_first")
    """
    return METHODS.register(cls)


def create(name: str, **hyper_parameters: Any) -> Compressor:
    """Build a method by name, with hyper-parameters where they differ from the defaults.

    Raises UnknownName for a name or a hyper-parameter that does not exist, and VTCError for a value that is refused.

    >>> create("fastv", layer=3)
    FastV(schedule=None, layer=3, ratio=None, scope='item')
    """
    return METHODS.create(name, **hyper_parameters)
