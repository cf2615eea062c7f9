"""Every exception the library raises on purpose, one root that callers can catch.

VTCError
├── BudgetError             retention or keep that cannot be met
├── UnknownName             a method, model, task or option that does not exist; names the nearest ones
├── UnsupportedModel        a model class or configuration no adapter can handle exactly
├── UnsupportedMethod       a method that needs a signal the model does not have
├── UnsupportedCall         a forward or generate() argument that compression cannot honour
└── InputError              an unreadable file, a malformed setting, an unwritable folder
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

LISTED = 300
"""Characters of the names that a message lists."""


class VTCError(ValueError):
    """Root of all errors raised by vtc; the message says what was given, why it is refused and what to write.

    >>> import vtc
    >>> try:
    ...     vtc.create("fastv", layer=0)
    ... except vtc.VTCError as error:
    ...     print(error)
    layer=0 leaves no layer in front to rank by; pass at least 1, the paper uses 2 and 3
    """


class BudgetError(VTCError):
    """A retention or keep count that is contradictory, missing or out of range."""


class UnknownName(VTCError):
    """A name that is not registered, or an option that does not exist."""


class UnsupportedModel(VTCError):
    """A model class or configuration for which compression would not be exact."""


class UnsupportedMethod(VTCError):
    """A method that needs something this model does not offer."""


class UnsupportedCall(VTCError):
    """An argument of forward() or generate() that cannot be combined with compression."""


class InputError(VTCError):
    """A file, folder or setting that cannot be used."""


def one_line(error: BaseException) -> str:
    """What `error` says, in one line, for a message that quotes it.

    >>> one_line(ValueError("no such\\n token.")), one_line(KeyError("size")), one_line(MemoryError())
    ('no such token', "KeyError: 'size'", 'MemoryError')
    """
    text = " ".join(str(error).split()).rstrip(".")
    said = text if len(text) <= 300 else f"{text[:300]}..."
    if not said or isinstance(error, LookupError | TypeError | AttributeError | AssertionError):
        return f"{type(error).__name__}: {said}".rstrip(": ")
    return said


def unknown_name(kind: str, name: object, known: Iterable[str], also: Iterable[str] = ()) -> UnknownName:
    """Build the error for an unregistered `name`, with near matches and the list, cut where it is long.

    also: names that may have been meant but do not belong to the list.

    >>> str(unknown_name("method", "vtc-cls", ["random", "vtc_cls"]))
    "unknown method 'vtc-cls'; did you mean 'vtc_cls'? Known methods: random, vtc_cls"
    """
    options = sorted(known)
    lower = {option.lower(): option for option in [*also, *options]}
    given = name.lower() if isinstance(name, str) else ""
    near = [lower[match] for match in difflib.get_close_matches(given, lower, n=3, cutoff=0.5)]
    hint = f" did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    kinds = kind if kind.endswith("s") else f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
    return UnknownName(f"unknown {kind} {shown(name)};{hint} Known {kinds}: {_listed(options)}")


def _listed(names: Sequence[str]) -> str:
    """All of them, or as many as fit into a message."""
    whole = ", ".join(names) or "none"
    return whole if len(whole) <= LISTED else f"{whole[: whole.rindex(', ', 0, LISTED)]}, ... ({len(names)} in all)"


def shown(value: object) -> str:
    """Any value for a message: its repr on one line, cut where it is long, without addresses.

    >>> shown("x"), shown([1.5, object()]), shown(int), len(shown("x" * 1000))
    ("'x'", '[1.5, object(...)]', 'int', 80)
    """
    if isinstance(value, type):
        return value.__qualname__
    try:
        text = re.sub(r"<(?:\w+\.)*(\w+)[^<>]* at 0x[0-9a-f]+>", r"\1(...)", " ".join(repr(value).split()))
    except Exception:  # an object under construction, a number of too many digits
        text = ""
    if not text or " at 0x" in text:
        return f"{type(value).__qualname__}(...)"
    return text if len(text) <= 80 else f"{text[:77]}..."
