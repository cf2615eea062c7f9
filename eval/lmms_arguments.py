"""lmms-eval's ``--model_args`` as values: everything arrives as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vtc.errors import InputError, unknown_name
from vtc.eval.cells import BASELINE
from vtc.method.registry import METHODS
from vtc.method.text import parse

AUTO = 8
"""Prompts per batch where lmms-eval is told `--batch_size auto`."""


def check_known(given: Iterable[str], method: str, own: Sequence[str]) -> None:
    """InputError for an argument that neither the model (`own`) nor the method `method` has, with the nearest names.

    Methods that are not registered are left to what makes them.
    """
    names = [] if method == BASELINE else [part.name for entry in parse(method) for part in entry]
    if not set(names) <= set(METHODS.names()):
        return
    fields = {field.name for name in names for field in dataclasses.fields(METHODS.get(name))}
    for name in given:
        if name not in fields:
            raise InputError(str(unknown_name("model argument", name, {*own, *fields})))


def batch_size_of(given: int | str, most: int | str | None) -> int:
    """Prompts per batch; of ``auto`` and ``auto:N`` the smaller of AUTO and `most`."""
    if str(given).partition(":")[0] == "auto":
        return min(AUTO, batch_size_of(most, None)) if most else AUTO
    number: int | None = number_of("batch_size", given, int)
    if number is None or number < 1:
        raise InputError(f"batch_size={given!r} is no number of prompts; write 8, for example, or auto")
    return number


def number_of(name: str, given: Any, kind: type) -> Any:
    """A number that lmms-eval hands on as text; None stays."""
    try:
        return given if given is None else kind(given)
    except (TypeError, ValueError) as error:
        example = {"retention": "0.25", "keep": "64", "seed": "0", "fps": "1"}.get(name, "8")
        raise InputError(f"{name}={given!r} is no number; write for example {name}={example}") from error
