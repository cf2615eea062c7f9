"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest

import vtc
import vtc.adapters
import vtc.eval

OPTIONAL = {"lmms_eval", "datasets", "av", "pandas", "pyarrow", "pydantic", "scipy", "sklearn", "statsmodels", "ray"}
"""What `pip install visual-token-compression[eval]` brings; modules that need it are skipped where it is missing."""

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def modules() -> Iterator[str]:
    for package in (vtc, vtc.adapters, vtc.eval):
        yield package.__name__
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                yield info.name


NAMES = sorted(set(modules()))


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.startswith("vtc.eval") and (error.name or "").split(".")[0] in OPTIONAL:
            pytest.skip(f"needs {error.name}")
        raise
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0


def test_the_examples_are_found() -> None:
    finder = doctest.DocTestFinder()
    counts = {
        name: sum(len(test.examples) for test in finder.find(importlib.import_module(name)))
        for name in ("vtc", "vtc.method.budget", "vtc.errors", "vtc.ops.select", "vtc.ops.grid")
    }
    assert min(counts.values()) > 0
    assert {"vtc.adapters.llava", "vtc.methods.vtc_cls", "vtc.eval.tiny"} <= set(NAMES)
