"""Learned methods: weights are written, found, compared with the run and loaded; every misfit says what to do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import vtc
from vtc.errors import InputError, UnknownName, VTCError
from vtc.method import weights
from vtc.method.base import ModelSpec, Selection, StageView
from vtc.method.learned import LearnedCompressor, load
from vtc.method.registry import METHODS, register

SPEC = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)


@dataclass(frozen=True)
class Learned(LearnedCompressor):
    """One linear layer of a chosen width."""

    width: int = 3
    depth: str = "deep"
    sides: tuple[int, ...] = ()

    name: ClassVar[str] = "test_learned"

    def build(self, model: ModelSpec) -> nn.Module:
        return nn.Linear(2, self.width)

    def settings(self, model: ModelSpec) -> dict[str, str]:
        return {"layers": str(model.llm_layers), "depth": self.depth}

    def select(self, view: StageView) -> Selection | None:
        return None


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    method = Learned(training=True)
    return method.save(tmp_path / "new" / "a.safetensors", method.module(SPEC), SPEC, {"steps": "7", "depth": "lost"})


def test_a_module_comes_back_as_it_was(stored: Path) -> None:
    tensors, metadata = weights.read(stored)
    assert metadata == {
        **{"method": "test_learned", "layers": "32", "depth": "deep"},
        **{"compressor": "test_learned", "hyper_parameters": '{"width": 3, "depth": "deep", "sides": []}'},
        **{"width": "3", "sides": "[]", "steps": "7"},
    }
    module = Learned(weights=str(stored)).module(SPEC)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert all(torch.equal(p, tensors[name]) for name, p in module.state_dict().items())
    again = Learned(weights=str(stored), training=True).module(SPEC)
    assert again.training and all(p.requires_grad and p.dtype == torch.float32 for p in again.parameters())
    assert torch.equal(again.weight, tensors["weight"])  # type: ignore[arg-type]


def test_weights_name_their_method(tmp_path: Path) -> None:
    register(Learned)
    try:
        method = Learned(width=5, sides=(2, 3), training=True)
        path = str(method.save(tmp_path / "a.safetensors", method.module(SPEC), SPEC))
        assert load(path) == Learned(width=5, sides=(2, 3), weights=path)
    finally:
        METHODS.unregister("test_learned")
    weights.save(path, {"a": torch.ones(1)}, {"method": "other"})
    with pytest.raises(VTCError, match="do not say which method they belong to; name it"):
        load(path)


def test_stored_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    method = Learned(training=True)
    path = method.save(tmp_path / "half.safetensors", method.module(SPEC).bfloat16(), SPEC)
    assert Learned(weights=str(path)).module(SPEC).weight.dtype == torch.float32


def test_a_fresh_module_needs_training() -> None:
    torch.manual_seed(0)
    a = Learned(training=True).module(SPEC)
    torch.manual_seed(0)
    assert torch.equal(a.weight, Learned(training=True).module(SPEC).weight)  # type: ignore[arg-type]
    with pytest.raises(VTCError, match=r"'test_learned' runs on learned weights and none .*`vtc train --method"):
        Learned().module(SPEC)


def test_other_settings_are_refused(stored: Path) -> None:
    with pytest.raises(VTCError, match=r"made with depth='deep', this run has depth='flat'; run them with the stored"):
        Learned(weights=str(stored), depth="flat").module(SPEC)
    tensors, metadata = weights.read(stored)
    del metadata["layers"]
    weights.save(stored, tensors, metadata)
    with pytest.raises(VTCError, match=r"do not say which layers .*'32' is wanted"):
        Learned(weights=str(stored)).module(SPEC)


def test_other_tensors_are_refused(stored: Path) -> None:
    with pytest.raises(VTCError, match=r"'bias' of shape \(3,\), \(4,\) is needed"):
        Learned(weights=str(stored), width=4).module(SPEC)
    tensors, metadata = weights.read(stored)
    weights.save(stored, {**tensors, "more": torch.zeros(1)}, metadata)
    with pytest.raises(VTCError, match="hold 'more', which nothing here uses"):
        Learned(weights=str(stored)).module(SPEC)
    del tensors["bias"]
    weights.save(stored, tensors, metadata)
    with pytest.raises(VTCError, match="lack 'bias'"):
        Learned(weights=str(stored)).module(SPEC)


def test_the_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).t(), "a": torch.ones(2)}
    notes = {"y": "1", "x": "2"}
    first = weights.save(tmp_path / "1.safetensors", tensors, notes)
    again = weights.save(tmp_path / "2.safetensors", dict(reversed(tensors.items())), dict(reversed(notes.items())))
    assert first.read_bytes() == again.read_bytes()
    assert torch.equal(weights.read(first)[0]["b"], tensors["b"])
    assert len(os.listdir(tmp_path)) == 2


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"does not end in \.safetensors"):
        weights.save(tmp_path / "a.bin", {}, {})
    with pytest.raises(InputError, match="there is no weights file"):
        weights.read(tmp_path / "missing.safetensors")
    with pytest.raises(UnknownName, match="unknown embedded weight 'atpp'"):
        weights.read("atpp")
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        weights.read(tmp_path / "a.safetensors")
    monkeypatch.setattr(weights, "WEIGHTS", tmp_path)
    weights.save(tmp_path / "own.safetensors", {"a": torch.ones(1)}, {})
    assert weights.embedded_names() == ("a", "own")
    assert weights.find("own") == tmp_path / "own.safetensors"


def test_results_are_those_of_the_files_bytes(tmp_path: Path) -> None:
    """Weights under the same name that hold something else are another cell of a sweep."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, bias in zip(paths, (0.0, 1.0), strict=True):
        method = vtc.create("atp", training=True)
        module = method.build(SPEC)
        torch.nn.init.constant_(next(module.parameters()), bias)
        method.save(path, module, SPEC)
    (one, other) = (vtc.create("atp", weights=str(path)).described() for path in paths)
    assert one.pop("weights_digest") != other.pop("weights_digest")
    assert {**one, "weights": None} == {**other, "weights": None}
    assert "weights_digest" not in vtc.create("random").described()


def test_every_embedded_file_says_what_it_is() -> None:
    for name in weights.embedded_names():
        tensors, metadata = weights.read(name)
        assert tensors and "method" in metadata
