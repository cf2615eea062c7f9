"""Slow plain references of the functions in `vtc.ops`, transcribed from the equations, one module per ops module.

A module offers a tuple CASES. The suite compares every case with its reference and traces it without host
synchronisation; `python -m vtc.testing.timing` times both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Size = Literal["small", "large"]


@dataclass(frozen=True)
class OpCase:
    """One function with its reference.

    plain: takes the same keyword arguments and returns the same, with Python loops over items and tokens; None for
    functions that only move data. make: keyword arguments of a small (odd sizes) or a large (realistic) call, seeded.
    tolerance: largest difference of floating-point results, relative to the largest value; 0.0 asks for equality.
    """

    op: Callable[..., Any]
    plain: Callable[..., Any] | None
    make: Callable[[Size], dict[str, Any]]
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        """Module and function, such as "select.top_k"."""
        return f"{self.op.__module__.rpartition('.')[2]}.{self.op.__name__}"


def op_cases() -> dict[str, OpCase]:
    """The CASES of every module of this package by name."""
    package = importlib.import_module(__name__)
    modules = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    cases: list[OpCase] = [case for name in modules for case in importlib.import_module(f"{__name__}.{name}").CASES]
    return {case.name: case for case in cases}
