"""Every example in a docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtc
import vtc.adapters
import vtc.eval
from vtc.method.registry import METHODS

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


def examples(value: object) -> bool:
    return ">>>" in (getattr(value, "__doc__", None) or "")


def test_every_public_name_has_an_example() -> None:
    """Names of `vtc`, methods, and what is public of `vtc.eval`, whose session on the API page counts as well."""
    reference = pytest.importorskip("vtc.eval.reference")
    names = {name: getattr(vtc, name) for name in vtc.__all__ if not isinstance(getattr(vtc, name), int)}
    names |= {name: METHODS.get(name) for name in METHODS.names() if METHODS.get(name).__module__.startswith("vtc.")}
    for module, found in reference.PUBLIC.items():
        names |= {name: getattr(importlib.import_module(module), name) for name in found}
    shown = {name for name in names if re.search(rf"\b{name}\b", reference.SESSION)}
    assert [name for name, value in names.items() if not examples(value) and name not in shown] == []


def test_the_session_of_the_evaluation_package_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("vtc.eval.reference")
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(reference.SESSION, {}, "vtc.eval.reference", None, 0)
    assert doctest.DocTestRunner(optionflags=OPTIONS).run(test).failed == 0
