"""What a selection says at a stage of a kind that would not read it is refused, in every such pair of the two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import vtc
from vtc.engine.unread import _READERS
from vtc.errors import UnsupportedCall
from vtc.method.base import (
    AFTER_PREFILL,
    Compressor,
    EncoderStage,
    ModelSpec,
    Needs,
    Plan,
    Selection,
    Stage,
    StageView,
)
from vtc.testing import tiny_inputs, tiny_model

STAGES: tuple[Stage, ...] = (EncoderStage(1), 0, 2, AFTER_PREFILL)
UNREAD = [(field, stage) for field, (_, kinds) in _READERS.items() for stage in STAGES if not isinstance(stage, kinds)]


@dataclass(frozen=True)
class Says(Compressor):
    """Keeps all but the first token and says one thing more."""

    stage: Stage = 0
    field: str = ""
    needs_budget = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((self.stage,), Needs(), "compact")

    def select(self, view: StageView) -> Selection | None:
        keep = view.items.mask & (view.items.token > 0)
        return replace(Selection(keep), **{self.field: torch.ones(keep.shape)})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llava-clip")


@pytest.mark.parametrize(("field", "stage"), UNREAD, ids=str)
def test_what_no_stage_of_this_kind_reads_is_refused(model: Any, field: str, stage: Stage) -> None:
    said = rf"{_READERS[field][0]} were given at stage .*alone read; leave them out there"
    inputs = tiny_inputs("llava-clip", [[4, "image", 3]])
    with vtc.compress(model, Says(stage, field)), torch.no_grad(), pytest.raises(UnsupportedCall, match=said):
        model(**inputs)


def test_every_field_that_changes_something_has_readers() -> None:
    """A field that is added to Selection is listed, or one of those that every kind of stage reads."""
    everywhere = {"keep", "counts", "merged_into", "scores"}
    assert set(Selection.__dataclass_fields__) == everywhere | set(_READERS)
