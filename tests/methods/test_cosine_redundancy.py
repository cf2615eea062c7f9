"""Cosine redundancy against every pair of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.method.base import ModelSpec, Needs
from vtc.testing import TINY_MODELS

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)


def plain_choice(x: Tensor, keep: int) -> list[int]:
    """Highest mean cosine to all tokens, itself included, goes first; of equals the later one."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    mean = [round(sum(float(a @ b) for b in unit) / len(unit), 7) for a in unit]
    return sorted(sorted(range(len(x)), key=lambda j: (mean[j], j))[:keep])


@pytest.mark.parametrize("scope", ["item", "crop"])
@pytest.mark.parametrize("keep", [1, 9, 30])
def test_the_plain_choice(make_view: Any, kept: Any, parted: Any, shape: Any, scope: Any, keep: int) -> None:
    shapes = [shape(((1, 3, 3), (1, 4, 5)), newlines=True), (5, 5), (1, 1), shape(((3, 3, 3),))]
    view = make_view(shapes, keep=keep)
    found = kept(view, vtc.create("cosine_redundancy", scope=scope).select(view))
    for item in range(len(view.items)):
        expected: list[int] = []
        for part, few in parted(view, item, scope):
            expected += [int(view.items.token[item, part[j]]) for j in plain_choice(view.tokens[item, part], few)]
        assert found[item] == sorted(expected)


def test_of_a_flat_picture_what_differs_stays(make_view: Any, kept: Any) -> None:
    """Duplicates and rows of zeros need no special case; the two odd tokens are kept."""
    view = make_view([(4, 4)], keep=2)
    view.tokens[0] = torch.nn.functional.one_hot(torch.zeros(16, dtype=torch.long), view.tokens.shape[2]).float()
    view.tokens[0, 5], view.tokens[0, 11] = -view.tokens[0, 0], 0.0
    assert kept(view, vtc.create("cosine_redundancy").select(view)) == [[5, 11]]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "cosine_redundancy", 0.4)


def test_plans() -> None:
    method = vtc.create("cosine_redundancy")
    assert dataclasses.asdict(method) == {"scope": "item"}
    for spec in (CLIP_L, dataclasses.replace(CLIP_L, mrope=True)):
        plan = method.plan(spec)
        assert (plan.stages, plan.needs) == ((0,), Needs())
        assert plan.positions == ("preserve" if spec.mrope else "compact")
