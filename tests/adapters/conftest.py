"""What the tests of model families share: encoder calls with their description, and what a method gets to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.engine.encoder import VisionRecorder, context_of
from vtc.method.base import Compressor, ModelSpec, Needs, Plan, StageView
from vtc.method.readings import VisionReading
from vtc.testing import tiny_model

Encode = Callable[..., Any]
Look = Callable[..., StageView]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Output and description of a feature method of the model: (model, kind, pixels, *further arguments)."""

    @torch.no_grad()
    def run(model: Any, kind: str, pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        recorder = VisionRecorder(adapters.of(model), Needs())
        recorder.install()
        try:
            output = getattr(model.model, f"get_{kind}_features")(pixels, *args, return_dict=True, **kwargs)
        finally:
            recorder.remove()
        return output, context_of(output)

    return run


@dataclass(frozen=True)
class Looking(Compressor):
    """Keeps everything and remembers its views."""

    needs: Needs = field(default_factory=Needs)
    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "looking"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((0,), self.needs, "preserve")

    def select(self, view: StageView) -> None:
        self.views.append(view)


@pytest.fixture(scope="session")
def look() -> Look:
    """What a method sees before the LLM: (model, inputs, encoder layer -> rows to record)."""

    def run(model: Any, inputs: dict[str, Tensor], vision: dict[int, VisionReading] | None = None) -> StageView:
        method = Looking(Needs(vision=vision or {}))
        with vtc.compress(model, method), torch.no_grad():
            model(**inputs)
        return method.views[0]

    return run


@pytest.fixture(scope="session")
def encoder_attention() -> Callable[..., list[Tensor]]:
    """[crops, T, T] mean attention over heads of every encoder layer, by the eager model of the same weights."""

    @torch.no_grad()
    def run(name: str, kind: str, pixels: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        model = tiny_model(name, attn_implementation="eager")
        weights: list[Tensor] = []
        for module in adapters.of(model).vision_attention:
            module.register_forward_hook(lambda module, args, output: weights.append(output[1].mean(1)))
        getattr(model.model, f"get_{kind}_features")(pixels, *args, **kwargs)
        return weights

    return run
