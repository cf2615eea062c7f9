"""VL-Cache's densities, budgets and choice, one row and one layer at a time, from the model's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import VTCError
from vtc.method.base import CacheStage
from vtc.methods.vlcache import SCARCE, shares
from vtc.testing import tiny_inputs, tiny_model


def plain_density(weights: Tensor, rows: list[int], threshold: float) -> float:
    """weights: [heads, S, S]."""
    large = seen = 0
    for head in weights.tolist():
        for row in rows:
            visible = head[row][: row + 1]
            large += sum(value >= threshold * max(visible) for value in visible)
            seen += len(visible)
    return large / seen


def plain_counts(keep: int, have: int, density: list[float], floor: float) -> list[float]:
    """The exact shares: raise x in small steps until the mean is met."""
    least = min(floor * have, keep)
    x = 0.0
    while True:
        found = [min(have, max(least, x * max(d, SCARCE))) for d in density]
        if sum(found) >= keep * len(density) - 1e-9:
            return found
        x += 0.01


@pytest.mark.parametrize("floor", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize(("keep", "have"), [(1, 1), (1, 7), (20, 50), (30, 50), (50, 50), (57, 576)])
@pytest.mark.parametrize("density", [(0.1, 0.2, 0.3), (0.9, 0.1, 0.1, 0.05), (0.4,), (0.0, 0.5), (0.0, 0.0, 0.0)])
def test_layers_share_the_budget_by_density(keep: int, have: int, floor: float, density: tuple[float, ...]) -> None:
    found = shares(keep, have, density, floor)
    assert sum(found) == keep * len(density)
    assert all(0 <= count <= have for count in found)
    if min(density) > 0:
        exact = plain_counts(keep, have, list(density), floor)
        assert all(abs(count - share) < 1.02 for count, share in zip(found, exact, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.01, 0.3])
@pytest.mark.parametrize("layout", [["image", 9], [4, "image", 3, "image", 40], [2, "image"]], ids=str)
def test_counts_and_kept_sets_are_those_of_the_models_own_attention(
    llm_weights: Any, layout: Any, threshold: float
) -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [layout], seed=2, model=model)
    with vtc.compress(model, "vlcache", threshold=threshold, retention=0.4) as handle:
        model(**inputs)
    with vtc.compress(model, "vlcache", threshold=threshold, per_head=False, retention=0.4) as shared:
        model(**inputs)
    (record,), length = handle.trace, inputs["input_ids"].shape[1]
    behind = list(range(int(record.items[-1].positions[-1]) + 1, length)) or [length - 1]
    weights = [each[0] for each in llm_weights("llava-clip", inputs)]
    density = [plain_density(each, behind, threshold) for each in weights]
    if threshold == 0.3:
        assert len(set(density)) > 1
    counts = shares(6, 16, tuple(torch.tensor(density).tolist()), 0.01)
    differ = 0
    for layer, each in enumerate(weights):
        drawn = each[:, behind].sum(1)
        scores = [drawn[:2].mean(0), drawn[2:].mean(0), drawn.mean(0)]  # two query heads share a KV head
        for item, other in zip(record.items, shared.trace[0].items, strict=True):
            stage, kept = CacheStage(layer), []
            for score in scores:
                order = sorted(range(16), key=lambda n: (-round(float(score[item.positions[n]]), 6), n))
                kept.append(sorted(order[: counts[layer]]))
            found = [sets.nonzero().flatten().tolist() for sets in item.heads[stage]]
            assert [*found, other.kept[stage].tolist()] == kept
            differ += kept[0] != kept[1]
    assert differ


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "qwen2.5-vl"])
def test_the_budget_is_that_of_the_caches(name: str, keeps_entries: Any) -> None:
    keeps_entries(name, "vlcache", 0.4)


def test_shares_beyond_the_whole_are_refused() -> None:
    for threshold in (0.0, 1.5):
        with pytest.raises(VTCError, match=r"is no share of a row's largest entry; pass a number above 0"):
            vtc.create("vlcache", threshold=threshold)
    with pytest.raises(VTCError, match=r"floor=2.0 is no share of a layer's entries; pass 0 to 1"):
        vtc.create("vlcache", floor=2.0)
