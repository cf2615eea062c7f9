"""G-Prune against the power of its whole matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import VTCError
from vtc.methods import gprune
from vtc.testing import TINY_MODELS


def plain_scores(x: Tensor, threshold: float = 0.5, tau: float = 0.03, steps: int = 5) -> list[float]:
    """The matrix entry by entry in float64, multiplied out, then one row vector."""
    x = x.double()
    length = x.norm(dim=1)
    unit, count = x / length[:, None].clamp(min=1e-12), len(x)
    rows, degree = [], []
    for i in range(count):
        logits = [float(unit[i] @ unit[j]) for j in range(count)]
        logits = [value / tau if value >= threshold else -5000.0 for value in logits]
        powers = [math.exp(value - max(logits)) for value in logits]
        rows.append([value / sum(powers) for value in powers])
        degree.append(sum(value > 0 for value in rows[-1]))
    walk = torch.tensor(rows).double()
    return ((length @ torch.linalg.matrix_power(walk, steps)) / torch.tensor(degree)).tolist()  # type: ignore[no-any-return]


def best(scores: list[float], keep: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:keep])


def alike(view: Any) -> Any:
    """Tokens around a few directions, of different lengths, so that some are joined and some are not."""
    generator = torch.Generator().manual_seed(5)
    width = view.tokens.shape[2]
    centre = torch.randn(4, width, generator=generator)
    of = torch.randint(4, view.tokens.shape[:2], generator=generator)
    noise = torch.randn(*of.shape, width, generator=generator)
    view.tokens.copy_((centre[of] + 0.6 * noise) * (1 + torch.rand(*of.shape, 1, generator=generator)))
    return view


@pytest.mark.parametrize("scope", ["item", "crop"])
@pytest.mark.parametrize("options", [{}, {"threshold": 0.7, "tau": 0.1, "steps": 2}], ids=str)
def test_the_plain_choice(make_view: Any, kept: Any, parted: Any, shape: Any, scope: Any, options: Any) -> None:
    shapes = [shape(((1, 3, 3), (1, 4, 5)), newlines=True), (5, 5), (1, 1), shape(((3, 3, 3),))]
    view = alike(make_view(shapes, keep=9))
    found = kept(view, vtc.create("gprune", scope=scope, **options).select(view))
    for item in range(len(view.items)):
        expected: list[int] = []
        for part, few in parted(view, item, scope):
            scores = plain_scores(view.tokens[item, part], **options)
            expected += [int(view.items.token[item, part[j]]) for j in best(scores, few)]
        assert found[item] == sorted(expected)


def test_streamed_scores_are_those_of_the_matrix(make_view: Any, monkeypatch: pytest.MonkeyPatch, limits: Any) -> None:
    view = alike(make_view([(6, 7), (5, 5)], keep=9))
    view.tokens[1, 3] = 0.0  # alike to none, not even to itself
    mask = view.items.mask
    whole = gprune.GPrune().collected(view.tokens, mask)
    for item, count in enumerate(view.items.counts):
        expected = torch.tensor(plain_scores(view.tokens[item, :count])).float()
        assert float((whole[item, :count] - expected).abs().max()) <= limits.hidden * float(expected.max())
    monkeypatch.setattr(gprune, "BLOCK", 5 * mask.numel())
    assert torch.allclose(gprune.GPrune().collected(view.tokens, mask), whole, rtol=1e-5)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "gprune", 0.4)


def test_defaults_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("gprune")) == {"threshold": 0.5, "tau": 0.03, "steps": 5, "scope": "crop"}
    for options in ({"threshold": 1.5}, {"tau": 0.0}, {"steps": 0}):
        with pytest.raises(VTCError, match="make no walk; use a cosine"):
            vtc.create("gprune", **options)
