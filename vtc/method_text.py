"""Methods as text, for command lines and files: ``random,hiprune@0.5+mustdrop(merge=off, filter=off)``.

A comma stands between methods, ``+`` between those that act together on one model. Each is a name, its
hyper-parameters in parentheses where they differ from the defaults, and behind ``@`` a retention of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc.composite import Composite, combine
from vtc.compressor import Compressor
from vtc.errors import BudgetError, InputError

PART = re.compile(r"(?P<name>[^()@=]+?)\s*(\((?P<parameters>.*)\))?\s*(@(?P<retention>[^@()]*))?", re.DOTALL)
WORDS = {"true": True, "false": False, "null": None}
OPEN, CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Named:
    """One method as written: name, hyper-parameters, and its own retention if it has one."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    retention: float | None = None


def parse(text: str) -> list[list[Named]]:
    """The methods in `text`, each as the list of those that act together.

    Raises InputError for what does not follow the form above.

    >>> parse("fastv(layer=1), hiprune@0.5+aim(merge=false)@0.6")[1][1]
    Named(name='aim', parameters={'merge': False}, retention=0.6)
    """
    return [[_part(part, entry) for part in split(entry, "+")] for entry in split(text, ",") if entry]


def split(text: str, separator: str) -> list[str]:
    """`text` cut at every `separator` that stands outside brackets and quotes, without white space around the pieces.

    >>> split("a(b=[1, 2]), c", ",")
    ['a(b=[1, 2])', 'c']
    """
    pieces, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in OPEN) - (char in CLOSE)
        if char == separator and not quote and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return [piece.strip() for piece in pieces]


def value(text: str) -> Any:
    """A hyper-parameter's value: a number, true, false, null, a Python literal, else the text itself.

    >>> value("0.5"), value("false"), value("[1, 2]"), value("off"), value("'1'")
    (0.5, False, [1, 2], 'off', '1')
    """
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def pairs(texts: Sequence[str], source: str) -> dict[str, Any]:
    """Hyper-parameters written as ``name=value``; `source` names where they stand in the error message."""
    options: dict[str, Any] = {}
    for pair in texts:
        name, equals, given = (piece.strip() for piece in pair.partition("="))
        if not equals or not name:
            raise InputError(f"{source}: {pair!r} is no name=value pair; write for example layers=3")
        if name in options:
            raise InputError(f"{source}: {name} is given twice; write it once")
        options[name] = value(given)
    return options


def together(
    methods: Sequence[Compressor], own: Sequence[float | None], retention: float | None, keep: int | None = None
) -> Composite:
    """The composite of `methods`: each with its `own` retention, or the only one that takes any with the given one.

    Raises BudgetError where neither says how much each keeps.
    """
    if any(share is not None for share in own):
        wanting = [m.name for m, share in zip(methods, own, strict=True) if m.needs_budget and share is None]
        if wanting:
            raise BudgetError(f"{wanting[0]!r} has no retention beside others that have; write {wanting[0]}@0.5")
        return combine(methods, own, None)
    wanting = [method.name for method in methods if method.needs_budget]
    if len(wanting) > 1:
        written = "+".join(f"{name}@0.5" for name in wanting)
        raise BudgetError(
            f"{' and '.join(map(repr, wanting))} take a retention each; write one behind each name, such as {written}"
        )
    return combine(methods, retention, keep)


def _part(text: str, entry: str) -> Named:
    match = PART.fullmatch(text)
    if match is None:
        raise InputError(
            f"method {entry!r} cannot be read; write a name with its hyper-parameters and retention, such as "
            "fastv(layer=1)@0.5, and + between methods that act together"
        )
    inside, share = match["parameters"], match["retention"]
    given = pairs(split(inside, ","), f"method {entry!r}") if inside and inside.strip() else {}
    return Named(match["name"].strip(), given, None if share is None else _retention(share, entry))


def _retention(text: str, entry: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise BudgetError(f"method {entry!r}: retention {text.strip()!r} behind @ is no number in (0, 1], such as 0.25")
    return share
