"""Stored inputs and outputs that were made without this code: every output of every case, through public functions.

A case lies in a folder named after its method: caseN.json says where it comes from and what its tensors mean,
caseN.safetensors holds them ("in." given, "out." expected). Folders of methods that are not registered yet wait.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.compressor import ModelSpec
from vtc.methods.vtc_cls import ensemble
from vtc.ops.select import top_k

HERE = Path(__file__).parent
Outputs = dict[str, tuple[Tensor, float]]
"""Name of an expected tensor -> what we get, and the largest relative difference allowed (0.0: equal)."""


def vtc_cls(case: dict[str, Any], given: dict[str, Tensor]) -> Outputs:
    """Head means of the window's class rows, their sum, and the kept patches per budget."""
    settings = case["hyper_parameters"]
    assert (settings["head_reduction"], settings["end_layer_exclusive"]) == ("mean", settings["num_layers"] - 1)
    layers = settings["num_layers"]
    spec = ModelSpec("llava", layers, layers - 2, True, tuple(range(layers)), 32)
    method = vtc.create("vtc_cls", start_layer=settings["start_layer"])
    rows = dict(zip(given["in.layer_ids"].tolist(), given["in.cls_attn"].float().mean(1)[:, 1:], strict=True))
    score = ensemble([rows[layer][None] for layer in method.window(spec)], method.reduction)  # type: ignore[attr-defined]
    outputs: Outputs = {"out.score": (score[0], 1e-5)}  # summed in another order
    for budget in settings["budgets"]:
        kept = top_k(score, torch.tensor([budget]))[0].nonzero().flatten()
        outputs[f"out.kept_{budget}"] = (kept, 0.0)
        retained = top_k(score, torch.tensor([vtc.tokens_to_keep(576, budget / 576)]))[0].nonzero().flatten()
        assert torch.equal(retained, kept)
    return outputs


CHECKERS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Outputs]] = {"vtc_cls": vtc_cls}
"""One checker per method with stored cases."""


def test_every_output_is_met(golden_case: Any) -> None:
    tensors = golden_case.tensors()
    expected = {name: tensor for name, tensor in tensors.items() if name.startswith("out.")}
    assert expected
    given = {name: tensor for name, tensor in tensors.items() if name.startswith("in.")}
    found = CHECKERS[golden_case.method](golden_case.description(), given)
    assert sorted(found) == sorted(expected)
    for name, (tensor, tolerance) in found.items():
        assert tensor.shape == expected[name].shape, name
        if tolerance == 0.0:
            assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name
        else:
            assert torch.allclose(tensor.double(), expected[name].double(), rtol=tolerance, atol=0.0), name


def test_every_case_says_what_it_holds(golden_case: Any) -> None:
    case, tensors = golden_case.description(), golden_case.tensors()
    assert (case["method"], case["case"]) == (golden_case.method, golden_case.name)
    assert re.fullmatch(r"case\d+\w*", golden_case.name)
    assert {"paper", "repository", "commit"} <= case["source"].keys()
    assert sorted(tensors) == sorted(case["tensors"])
    for name, about in case["tensors"].items():
        assert list(tensors[name].shape) == about["shape"]
        assert str(tensors[name].dtype).removeprefix("torch.") == about["dtype"]
        assert about["meaning"]
        assert math.prod(about["shape"]) > 0


def test_every_registered_method_with_cases_has_a_checker(all_golden_cases: list[Any]) -> None:
    stored = {case.method for case in all_golden_cases}
    assert stored & set(vtc.list_methods()) == set(CHECKERS)


def test_the_repository_brings_its_own_cases(all_golden_cases: list[Any]) -> None:
    names = {(case.method, case.name) for case in all_golden_cases}
    assert {("vtc_cls", "case1"), ("vtc_cls", "case2")} <= names
    own = [case for case in all_golden_cases if case.path.is_relative_to(HERE)]
    assert {case.method for case in own} == set(CHECKERS)


@pytest.mark.parametrize("name", CHECKERS)
def test_a_checker_notices_a_fault(all_golden_cases: list[Any], name: str) -> None:
    """Inputs of another layer order must not give the stored outputs."""
    case = next(case for case in all_golden_cases if case.method == name)
    tensors = case.tensors()
    given = {k: v.flip(0) if v.is_floating_point() else v for k, v in tensors.items() if k.startswith("in.")}
    found = CHECKERS[name](case.description(), given)
    assert any(not torch.allclose(tensor.double(), tensors[k].double()) for k, (tensor, _) in found.items())
