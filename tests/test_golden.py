"""Stored inputs and outputs that were made without this code: every output of every case, through public functions.

A case lies in a folder named after its method: caseN.json says where it comes from and what its tensors mean,
caseN.safetensors holds them. The module golden_checks/<folder>.py recomputes the outputs: ``check(case, tensors)``
returns name -> (tensor, rtol, atol), 0 and 0 asking for equality; INPUTS names what is given (names or prefixes, or
case -> those where one name is given in one case and asked for in another).
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
GIVEN = ("in.", "input.", "w.", "weights.")


def checker(folder: str) -> Any:
    """The module that knows a folder's cases; a folder without one is an error."""
    path = HERE / "golden_checks" / f"{folder}.py"
    assert path.exists(), f"golden cases of {folder!r} have no checker: write {path.name} in {path.parent}"
    spec = importlib.util.spec_from_file_location(f"golden_{folder}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def given(module: Any, case: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs among a case's tensors."""
    inputs = getattr(module, "INPUTS", ())
    names = (*GIVEN, *(inputs[case] if isinstance(inputs, dict) else inputs))
    return {k: v for k, v in tensors.items() if any(k == name or k.startswith(name) for name in names)}


def differs(found: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    if found.shape != expected.shape:
        return True
    if rtol == atol == 0.0:
        return not torch.equal(found.to(expected.dtype), expected)
    return not torch.allclose(found.double(), expected.double(), rtol=rtol, atol=atol)


def test_every_output_is_met(golden_case: Any) -> None:
    module, tensors = checker(golden_case.method), golden_case.tensors()
    inputs = given(module, golden_case.name, tensors)
    expected = {name: tensor for name, tensor in tensors.items() if name not in inputs}
    assert inputs
    assert expected
    found = module.check(golden_case.description(), inputs)
    assert sorted(found) == sorted(expected)
    wrong = [name for name, (tensor, *limits) in found.items() if differs(tensor, expected[name], *limits)]
    assert wrong == []


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


def test_an_unknown_case_is_an_error(all_golden_cases: list[Any]) -> None:
    with pytest.raises(AssertionError, match="golden cases of 'nobody' have no checker"):
        checker("nobody")
    assert all_golden_cases


def test_a_checker_notices_a_fault(golden_case: Any) -> None:
    """Other inputs of the same size must not give the stored outputs."""
    module, tensors = checker(golden_case.method), golden_case.tensors()
    generator = torch.Generator().manual_seed(0)
    wrong = {
        k: torch.randn(v.shape, generator=generator).to(v.dtype) * v.float().std(unbiased=False).to(v.dtype)
        if v.is_floating_point()
        else v
        for k, v in given(module, golden_case.name, tensors).items()
    }
    found = module.check(golden_case.description(), wrong)
    assert any(differs(tensor, tensors[name], *limits) for name, (tensor, *limits) in found.items())
