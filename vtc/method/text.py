"""Methods as text, for command lines and files: ``random,hiprune@0.5+mustdrop(merge=off, filter=off)``.

A comma stands between methods, ``+`` between those that act together on one model. Each is a name, its
hyper-parameters in parentheses where they differ from the defaults, and behind ``@`` a budget of its own: a retention
such as 0.5, or a number of tokens such as 64.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtc.errors import BudgetError, InputError
from vtc.method.base import Compressor
from vtc.method.budget import Budget
from vtc.method.composite import Composite, combine
from vtc.method.hyper_parameters import parse as parse_value
from vtc.method.registry import METHODS, create

PART = re.compile(r"(?P<name>[^()@=]+?)\s*(\((?P<parameters>.*)\))?\s*(@(?P<budget>[^@()]*))?", re.DOTALL)
OPEN, CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Named:
    """One method as written: name, hyper-parameters, and its own budget if it has one."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    budget: Budget | None = None


def parse(text: str) -> list[list[Named]]:
    """The methods in `text`, each as the list of those that act together.

    Raises InputError for what does not follow the form above.

    >>> parse("fastv(layer=1), hiprune@0.5+aim(merge=false)@0.6")[1][1]
    Named(name='aim', parameters={'merge': False}, budget=Budget(retention=0.6, keep=None))
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


def read(method: str | None, name: str, text: str) -> Any:
    """The value of the hyper-parameter `name` as typed.

    That of a registered `method` is read as its field is annotated, any other as a number, a word such as false or
    none, or a Python literal.
    """
    return parse_value(METHODS.get(method) if method in METHODS.names() else Compressor, name, text)


def pairs(texts: Sequence[str], source: str, method: str | None = None) -> dict[str, Any]:
    """Hyper-parameters of `method` written as ``name=value``; `source` names where they stand in the error message."""
    options: dict[str, Any] = {}
    for pair in texts:
        name, equals, given = (piece.strip() for piece in pair.partition("="))
        if not equals or not name:
            raise InputError(f"{source}: {pair!r} is no name=value pair; write for example layers=3")
        if name in options:
            raise InputError(f"{source}: {name} is given twice; write it once")
        options[name] = read(method, name, given)
    return options


def together(methods: Sequence[Compressor], own: Sequence[Budget | None], shared: Budget | None) -> Composite:
    """The composite of `methods`: each with its `own` budget, or the only one that takes any with the shared one.

    Raises BudgetError where neither says how much each keeps.
    """
    if any(budget is not None for budget in own):
        wanting = [m.name for m, budget in zip(methods, own, strict=True) if m.needs_budget and budget is None]
        if wanting:
            raise BudgetError(f"{wanting[0]!r} has no retention beside others that have; write {wanting[0]}@0.5")
        return combine(methods, *_limits(own))
    wanting = [method.name for method in methods if method.needs_budget]
    if len(wanting) > 1:
        written = "+".join(f"{name}@0.5" for name in wanting)
        raise BudgetError(
            f"{' and '.join(map(repr, wanting))} take a retention each; write one behind each name, such as {written}"
        )
    return combine(methods, *_limits([shared if method.needs_budget else None for method in methods]))


def _limits(budgets: Sequence[Budget | None]) -> tuple[list[float | None], list[int | None]]:
    """Retentions and numbers of tokens of `budgets`."""
    return [b.retention if b else None for b in budgets], [b.keep if b else None for b in budgets]


def attachable(
    text: str,
    options: Mapping[str, Any],
    *,
    retention: float | None = None,
    keep: int | None = None,
    seed: int | None = None,
) -> tuple[Compressor, dict[str, Any]]:
    """The one method, or the several together, that `text` names, and the limits that `vtc.compress` takes with it.

    options: further hyper-parameters of a single method. seed: of parts that have one and do not set it.
    Raises InputError for a list of methods, UnknownName for names, BudgetError for a budget that is missing or double.
    """
    entries = parse(text)
    if len(entries) != 1:
        raise InputError(f"method {text!r} is a list of {len(entries)}; name one, or several that act together as a+b")
    parts = entries[0]
    if options and len(parts) > 1:
        raise InputError(
            f"{', '.join(options)} given beside several methods; write hyper-parameters as {parts[0].name}(name=value)"
        )
    own = [part.budget for part in parts]
    if any(own) and (retention is not None or keep is not None):
        raise BudgetError(f"method {text!r} has its own budget beside another retention or keep; write one of them")
    methods = [seeded(part.name, {**part.parameters, **options}, seed) for part in parts]
    nothing = {"retention": None, "keep": None}
    if len(methods) > 1:
        shared = None if retention is None and keep is None else Budget(retention, keep)
        return together(methods, own, shared), nothing
    limits = {"retention": retention, "keep": keep} if own[0] is None else vars(own[0])
    if methods[0].needs_budget:
        Budget(**limits)
    elif limits != nothing:
        raise BudgetError(f"{text!r} takes no retention or keep; its hyper-parameters decide how much it keeps")
    return methods[0], limits


def seeded(name: str, parameters: Mapping[str, Any], seed: int | None) -> Compressor:
    """The method `name`; one that has a `seed` gets this one unless its own is given."""
    method = create(name, **parameters)
    if seed is not None and "seed" not in parameters and "seed" in {f.name for f in dataclasses.fields(method)}:
        method = create(name, **parameters, seed=seed)
    return method


def _part(text: str, entry: str) -> Named:
    match = PART.fullmatch(text)
    if match is None:
        raise InputError(
            f"method {entry!r} cannot be read; write a name with its hyper-parameters and retention, such as "
            "fastv(layer=1)@0.5, and + between methods that act together"
        )
    inside, budget = match["parameters"], match["budget"]
    name = match["name"].strip()
    given = pairs(split(inside, ","), f"method {entry!r}", name) if inside and inside.strip() else {}
    return Named(name, given, None if budget is None else _budget(budget.strip(), entry))


def _budget(text: str, entry: str) -> Budget:
    if text.isdecimal() and int(text) > 1:
        return Budget(keep=int(text))
    try:
        return Budget(retention=float(text))
    except ValueError:
        raise BudgetError(
            f"method {entry!r}: {text!r} behind @ is no retention in (0, 1], such as 0.25, and no number of tokens, "
            "such as 64"
        ) from None
