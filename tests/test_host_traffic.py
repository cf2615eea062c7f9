"""No method reads its tensors back: `select` runs on views of fake tensors, which hold no values to read."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import vtc
from vtc.method.base import Compressor, StageView
from vtc.method.items import ItemTable
from vtc.method.layout import VisualItem
from vtc.method.pairs import PairFeatures
from vtc.testing import tiny_inputs, tiny_model
from vtc.testing.contract import with_fresh_weights
from vtc.testing.everything import limits, runs, small
from vtc.testing.pairs import with_tiny_pair

LAYOUT: list[list[Any]] = [[4, "image", 3, "image", 5], [2, "image", 12]]
READS = {
    "mustdrop": "the size of the key set, once per call, for the schedule",
    "vlcache": "how dense every layer is, once per call, for their budgets",
    "vqtoken": "whether k-means is done, on the CPU alone",
    "vqtoken_codebook": "whether k-means is done, on the CPU alone",
}
"""Methods that read something back at their first stage, and what."""


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """The same view with fake tensors for all its tensors."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: faked(entry, mode) for key, entry in value.items()}
    if type(value) is tuple:
        return tuple(faked(entry, mode) for entry in value)
    if isinstance(value, StageView | ItemTable | VisualItem | PairFeatures):
        return type(value)(**{f.name: faked(getattr(value, f.name), mode) for f in dataclasses.fields(value)})
    return value


def views(method: Compressor, name: str, **told: Any) -> list[StageView]:
    """What the method sees at its stages in one call, as it was before the method looked."""
    seen: list[StageView] = []
    select = type(method).select

    def noting(self: Any, view: StageView) -> Any:
        seen.append(dataclasses.replace(view, memory=dict(view.memory)))
        return select(self, view)

    model = tiny_model(name)
    budget = limits(method)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(method), "select", noting)
        with vtc.compress(model, method, **budget, **told):
            model(**tiny_inputs(name, LAYOUT, model=model))
    return seen


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("registered", vtc.list_methods())
def test_methods_read_nothing_back(registered: str, name: str) -> None:
    method = small(registered)
    spec = vtc.adapters.of(tiny_model(name)).spec
    method = with_fresh_weights(method, spec)
    if not runs(method, spec):
        pytest.skip("does not run on this family")
    method, told = with_tiny_pair(method, name)
    found = views(method, name, **told)
    assert found
    reading = 0
    for view in found:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = faked(view, mode)
        try:
            with mode, torch.no_grad():
                method.select(fake)
        except DataDependentOutputException:
            reading += 1
    assert reading == (registered in READS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(os.environ.get("VTC_SYNC_DEBUG") != "error", reason="on request: VTC_SYNC_DEBUG=error")
@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
@pytest.mark.parametrize("registered", [name for name in vtc.list_methods() if "CPU" in READS.get(name, "CPU")])
def test_no_stage_waits_for_the_gpu(registered: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises wherever the host waits inside a selection, copies of numbers from the host included."""
    model = tiny_model(name).cuda()
    spec = vtc.adapters.of(model).spec
    method = with_fresh_weights(small(registered), spec)
    if not runs(method, spec):
        pytest.skip("does not run on this family")
    method, told = with_tiny_pair(method, name)
    select = type(method).select

    def strict(self: Any, view: StageView) -> Any:
        try:
            torch.cuda.set_sync_debug_mode("error")
            return select(self, view)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    inputs = {key: value.cuda() for key, value in tiny_inputs(name, LAYOUT).items()}
    monkeypatch.setattr(type(method), "select", strict)
    budget = limits(method)
    with torch.no_grad(), vtc.compress(model, method, **budget, **told):
        model(**inputs)


@pytest.mark.parametrize("room", ["methods", "ops", "batch"])
def test_no_literal_is_assigned_through_an_index(room: str) -> None:
    """torch copies it from the host and waits, which only a GPU shows: slices are fine."""
    folder = Path(vtc.__file__).parent / room
    found = []
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                indices = [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
                found += [f"{file.name}:{node.lineno}" for index in indices if not plain(index)]
    assert not found


def plain(index: ast.expr) -> bool:
    """Whether an index in square brackets holds slices and literals alone."""
    parts = index.elts if isinstance(index, ast.Tuple) else [index]
    return all(isinstance(part, ast.Slice | ast.Constant | ast.UnaryOp) for part in parts)


def test_the_test_notices_a_read() -> None:
    """A tensor turned into a number raises."""
    mode = FakeTensorMode()
    with mode, pytest.raises(DataDependentOutputException):
        mode.from_tensor(torch.ones(3)).sum().item()
