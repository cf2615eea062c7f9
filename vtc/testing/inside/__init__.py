"""Methods that act inside vision encoders as slow plain loops over one image, one module per method of that name.

A module offers a CASE. `vtc.testing.inside.contract` compares each with its method on every tiny encoder, and
`python -m vtc.testing.inside` prints the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtc.testing.encoders import Act

Plain = Callable[[Any, Tensor, int, "int | None"], Act]
"""(method, image [3, H, W], number of class and register tokens, patches to keep, None where the method decides) ->
what it does before every block."""


@dataclass(frozen=True)
class InsideCase:
    """One method with its plain loop. variants: hyper-parameters to compare with, beside those that put it inside."""

    plain: Plain
    variants: tuple[dict[str, Any], ...] = ({},)


def case_of(name: str) -> InsideCase:
    """The case of the method of that name; AssertionError where nobody wrote one."""
    module = f"{__name__}.{name}"
    assert importlib.util.find_spec(module), (
        f"{name!r} acts inside encoders and has no plain loop; write one as CASE in vtc/testing/inside/{name}.py"
    )
    case: InsideCase = importlib.import_module(module).CASE
    return case
