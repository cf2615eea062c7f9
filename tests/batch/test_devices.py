"""A batch follows the hidden states of a model whose layers lie on several devices, with everything it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import vtc
from vtc.batch.rows import RowTable
from vtc.batch.trace import CallRecord
from vtc.engine.cache import CompressedCache
from vtc.method.base import AFTER_PREFILL, Compressor, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.method.layout import VisualItem
from vtc.ops.hashing import uniform
from vtc.testing import tiny_inputs, tiny_model

OWN_DEVICE = (CompressedCache, CallRecord, VisualItem, nn.Module)
"""What stays where it is: the cache's layers with the model's, traces, geometry, which is moved where it is read."""


def tensors(value: Any, path: str, seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Path and tensor of everything that can be reached from `value` without entering `OWN_DEVICE`."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):  # by every path that leads to it: each is moved on its own
        yield path, value
        return
    if id(value) in seen or isinstance(value, OWN_DEVICE):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{path}[{key}]", seen)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from tensors(part, f"{path}[{place}]", seen)
    elif type(value).__module__.startswith("vtc."):
        for name, part in vars(value).items():
            yield from tensors(part, f"{path}.{name}", seen)


@dataclass(frozen=True)
class Everything(Compressor):
    """Leaves something in every field: drops, hides, softens, limits, adds a loss, reads LLM layers, ahead as well."""

    name: ClassVar[str] = "everything"
    needs_budget: ClassVar[bool] = False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((0, 1, 2, AFTER_PREFILL), Needs(llm={0: Rows.LAST}), "compact")

    def select(self, view: StageView) -> Selection:
        keep, mask = uniform(view.fingerprint, view.items.token, 1) < 0.7, view.items.mask
        if view.stage in (0, AFTER_PREFILL):
            return Selection(keep)
        weights = torch.full(mask.shape, 0.5) if view.stage == 2 else None
        near = torch.zeros(*mask.shape, 1) if view.stage == 1 else None
        return Selection(mask, view.items.counts, hide=~keep, weights=weights, near=near, loss=view.hidden.sum())


def test_everything_of_a_batch_follows_the_hidden_states() -> None:
    model = tiny_model("qwen3-vl")
    inputs = tiny_inputs("qwen3-vl", [[4, "image", 3, "image", 5], [2, "image", 12], [9]], seed=3, model=model)
    found: list[tuple[str, str]] = []
    moved: list[tuple[str, str]] = []

    def leave(module: nn.Module, args: Any) -> None:
        one = handle._engine.passes.current
        assert one is not None
        found.extend((path, each.device.type) for path, each in tensors(one.now, "batch"))
        moved.extend((path, each.device.type) for path, each in tensors(one.now.to(torch.device("meta")), "batch"))
        raise InterruptedError

    with vtc.compress(model, Everything()) as handle:
        hook = vtc.adapters.of(model).layers[2].register_forward_pre_hook(leave)
        try:
            model(**inputs, use_cache=False)
        except InterruptedError:
            pass
        finally:
            hook.remove()
    assert {device for _, device in found} == {"cpu"}
    for part in (*(f.name for f in fields(RowTable)), "deepstack", "items", "separators"):
        assert any(part in path for path, _ in found), f"nothing fills {part}"
    assert [path for path, _ in moved] == [path for path, _ in found]
    assert [path for path, device in moved if device != "meta"] == []
