"""Hyper-parameters are checked and converted by their annotations, once for all methods.

`int` takes whole numbers, `float` finite ones, of Python or numpy; `bool` takes True and False alone, neither 0 and 1
nor words; `Literal` its options; `tuple[...]` and `Sequence[...]` any sequence, but not a single number; `str` text,
and paths where the annotation names `os.PathLike`. What comes out is plain Python, lists as tuples, so that equal
values make equal methods, hash alike and can be written as JSON. Annotations that are not understood here let
everything pass.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from vtc.errors import VTCError, shown, unknown_name


class _Refused(Exception):
    """A value that an annotation does not take; the text is the reason where the annotation's name is not enough."""


def check(method: Any) -> None:
    """Replace every field of a frozen dataclass by its checked value; VTCError for one that is refused."""
    cls: type = type(method)
    kinds, owner = field_annotations(cls), getattr(method, "name", cls.__name__)
    for field in dataclasses.fields(method):
        if field.init and hasattr(method, field.name):  # an __init__ of its own may set some later
            given = getattr(method, field.name)
            value = checked(field.name, given, kinds[field.name], owner=owner, default=field.default)
            if value is not given:
                object.__setattr__(method, field.name, value)


def checked(name: str, given: Any, annotation: Any, *, owner: str, default: Any = None) -> Any:
    """`given` as the annotation says.

    Raises UnknownName for what is not among the options, VTCError for any other value of another type; `default` is
    the example in the message.
    """
    try:
        return _convert(annotation, given)
    except _Refused as refused:
        if options := _options(annotation):
            raise unknown_name(name, given, options) from None
        example = _example(annotation) if default is None or default is dataclasses.MISSING else default
        reason = str(refused) or f"is not {_words(annotation)}"
        raise VTCError(f"{name}={shown(given)} of {owner!r} {reason}; write for example {name}={example!r}") from None


def parse(cls: type, name: str, text: str) -> Any:
    """The value that `text`, as typed on a command line, stands for in the field `name` of `cls`.

    true, false, none and null are words in any case, unless they are among the field's options; numbers, lists and
    tuples are written as in Python. What the field does not take comes back for the constructor to refuse.
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    try:
        value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = text
    annotation = field_annotations(cls).get(name, Any)
    for candidate in (text, value) if text in _options(annotation) else (value, text):
        try:
            return _convert(annotation, candidate)
        except _Refused:
            continue
    return value


@functools.cache
def field_annotations(cls: type) -> dict[str, Any]:
    """Annotation of every field of a dataclass, resolved; Any where a name in it cannot be found."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(base).items():
            alone = type(base.__name__, (), {"__annotations__": {name: annotation}, "__module__": base.__module__})
            try:
                found[name] = get_type_hints(alone, include_extras=True)[name]
            except Exception:  # a name of another scope, or one that only type checkers import
                found[name] = Any
    return {field.name: found.get(field.name, Any) for field in dataclasses.fields(cls)}


# --- values
def _convert(annotation: Any, value: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _convert(arguments[0], value)
    if origin in (Union, UnionType):
        return _one_of(arguments, value)
    if origin is Literal:
        for option in arguments:
            with contextlib.suppress(_Refused):
                if _convert(type(option), value) == option:
                    return option
        raise _Refused
    if origin is tuple:
        return _tuple(arguments, value)
    if origin is Sequence:
        return _tuple((*arguments, ...), value)
    if os.PathLike in (origin, annotation):
        return _path(value)
    return PLAIN[annotation].take(value) if annotation in PLAIN else value


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    """The first kind that takes the value; whole numbers try `float` last, other numbers `int`."""
    inexact = float if isinstance(value, Integral) else int
    reason = ""
    for kind in sorted(kinds, key=lambda kind: kind is inexact):
        try:
            return _convert(kind, value)
        except _Refused as refused:
            reason = reason or str(refused)
    raise _Refused(reason)


def _tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _Refused
    if len(kinds) == 2 and kinds[1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _Refused
    parts = tuple(_convert(kind, part) for kind, part in zip(kinds, value, strict=True))
    same = type(value) is tuple and all(part is given for part, given in zip(parts, value, strict=True))
    return value if same else parts  # type: ignore[return-value]


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not (isinstance(value, Integral) or _number(value).is_integer()):
        raise _Refused
    if not -(2**63) <= value < 2**63:
        raise _Refused("does not fit into 64 bits")
    return int(value)


def _number(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Refused
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _Refused
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused
    return str(value)


def _path(value: Any) -> str:
    if not isinstance(value, os.PathLike):
        raise _Refused
    return _text(os.fspath(value))


def _none(value: Any) -> None:
    if value is not None:
        raise _Refused


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A plain type: its converter, its name as one and as many, an example."""

    take: Callable[[Any], Any]
    one: str
    many: str
    example: Any


PLAIN: dict[Any, _Kind] = {
    int: _Kind(_integer, "a whole number", "whole numbers", 2),
    float: _Kind(_number, "a finite number", "finite numbers", 0.5),
    bool: _Kind(_truth, "True or False", "True or False", True),
    str: _Kind(_text, "a string", "strings", "name"),
    NoneType: _Kind(_none, "None", "None", None),
}


# --- words
def _options(annotation: Any) -> tuple[str, ...]:
    """What a Literal, alone or beside None, offers."""
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    kinds = get_args(annotation) if get_origin(annotation) in (Annotated, Union, UnionType) else ()
    return next(filter(None, map(_options, kinds)), ())


def _words(annotation: Any, one: bool = True) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], one)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(kind, one) for kind in arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is Sequence:
        return _words(tuple[arguments[0], ...], one)  # type: ignore[valid-type]
    if origin is tuple:
        count = "" if arguments[1:] == (...,) else f"{len(arguments)} "
        kinds = dict.fromkeys(_words(kind, one=False) for kind in arguments if kind is not ...)
        return f"{'a tuple' if one else 'tuples'} of {count}{' and '.join(kinds)}"
    if os.PathLike in (origin, annotation):
        return "a path" if one else "paths"
    plain = PLAIN.get(annotation)
    return getattr(annotation, "__name__", str(annotation)) if plain is None else plain.one if one else plain.many


def _example(annotation: Any, place: int = 1) -> Any:
    """A value of the annotation; whole numbers rise along a tuple, as layers do."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated or origin in (Union, UnionType):
        return _example(arguments[0], place)
    if origin is tuple:
        return tuple(_example(kind, place) for place, kind in enumerate(arguments, 1) if kind is not ...)
    if origin is Sequence:
        return (_example(arguments[0]),)
    if origin is Literal:
        return arguments[0]
    if annotation is int:
        return 2 * place
    return PLAIN[annotation].example if annotation in PLAIN else None
