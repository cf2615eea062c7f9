"""Stored inputs and outputs that were made without this code: every output of every case, from a run of the method.

A case lies in a folder named after its method: caseN.json says where it comes from and what its tensors mean,
caseN.safetensors holds them. The module golden_checks/<folder>.py runs the method on what is given and says what came
out; see golden_checks/_replay.py.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent


def checker(folder: str, tensors: dict[str, Tensor]) -> Any:
    """What checks a folder's cases of the kind that has these tensors; a folder without a checker is an error."""
    path = HERE / "golden_checks" / f"{folder}.py"
    assert path.exists(), f"golden cases of {folder!r} have no checker: write {path.name} in {path.parent}"
    checks = importlib.import_module(folder).CHECKS
    known = [check for name, check in checks.items() if name in tensors]
    assert len(known) == 1, f"{len(known)} checks of {path.name} fit this case; CHECKS names {', '.join(checks)}"
    return known[0]


def differs(found: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    if found.shape != expected.shape:
        return True
    if rtol == atol == 0.0:
        return not torch.equal(found.to(expected.dtype), expected)
    return not torch.allclose(found.double(), expected.double(), rtol=rtol, atol=atol)


def compare(golden_case: Any, other: Callable[[Tensor], Tensor] = lambda given: given) -> None:
    """Run a case with what `other` makes of its given tensors; every output must be the stored one."""
    case, tensors = golden_case.description(), golden_case.tensors()
    check = checker(golden_case.method, tensors)
    inputs = check.inputs(tensors)
    expected = {name: tensor for name, tensor in tensors.items() if name not in inputs}
    assert inputs
    assert expected
    expected |= check.corrected(case, tensors)
    found = check.run(case, {name: other(tensor) for name, tensor in inputs.items()})
    assert sorted(found) == sorted(expected)
    wrong = [name for name, (tensor, *limits) in found.items() if differs(tensor, expected[name], *limits)]
    assert wrong == []


def test_every_output_is_met(golden_case: Any) -> None:
    compare(golden_case)


def test_every_case_says_what_it_holds(golden_case: Any) -> None:
    case, tensors = golden_case.description(), golden_case.tensors()
    assert case["case"] == golden_case.name
    assert re.fullmatch(r"case\d+\w*", golden_case.name)
    about = case["tensors"] if "tensors" in case else {**case["inputs"], **case["outputs"]}
    for name, entry in about.items():
        assert list(tensors[name].shape) == entry["shape"]
        assert str(tensors[name].dtype).removeprefix("torch.") == entry["dtype"]
    assert set(about) <= set(tensors)


def test_the_repository_brings_its_own_cases(all_golden_cases: list[Any]) -> None:
    own = {case.method for case in all_golden_cases if case.path.is_relative_to(HERE)}
    assert own == {case.method for case in all_golden_cases}
    checkers = {path.stem for path in (HERE / "golden_checks").glob("*.py") if not path.stem.startswith("_")}
    assert checkers == own


def test_an_unknown_case_is_an_error() -> None:
    with pytest.raises(AssertionError, match="golden cases of 'nobody' have no checker"):
        checker("nobody", {})
    with pytest.raises(AssertionError, match="0 checks of fastv"):
        checker("fastv", {"in.nothing": torch.zeros(1)})


def test_a_checker_notices_a_fault(golden_case: Any) -> None:
    """The same numbers in other places do not give the stored outputs."""
    generator = torch.Generator().manual_seed(0)

    def shuffled(given: Tensor) -> Tensor:
        places = torch.randperm(given.numel(), generator=generator)
        return given.flatten()[places].view_as(given) if given.is_floating_point() else given

    with pytest.raises(AssertionError):
        compare(golden_case, shuffled)
