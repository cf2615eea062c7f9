"""Uniform stride against its formulas, one token at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import VTCError

SHAPES = [(7, 9), (1, 1), (24, 24), (2, 3), (5, 13), (24, 24), (7, 9)]
BUDGETS = [{"retention": r} for r in (0.04, 0.25, 1 / 3, 0.5, 0.99)] + [{"keep": k} for k in (1, 2, 7, 64)]


def plain_sequence(tokens: int, keep: int) -> list[int]:
    """idx_j = floor((j + 0.5) * N / k)."""
    return [math.floor((2 * j + 1) * tokens / (2 * keep)) for j in range(keep)]


def plain_grid(height: int, width: int, keep: int) -> list[int]:
    """floor((i + 0.5) * h / h') of the rows; in each its share of the tokens at floor((i + 0.5) * w / w')."""
    rows = max(1, math.floor(height * math.sqrt(keep / (height * width)) + 0.5), math.ceil(keep / width))
    rows = min(height, rows)
    owner = [j * rows // keep for j in range(keep)]
    chosen = []
    for i in range(rows):
        held = owner.count(i)
        chosen += [(2 * i + 1) * height // (2 * rows) * width + (2 * j + 1) * width // (2 * held) for j in range(held)]
    return chosen


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("layout", ["grid", "sequence"])
def test_the_plain_stride(make_view: Any, kept: Any, layout: Any, budget: Any) -> None:
    view = make_view(SHAPES, **budget)
    found = kept(view, vtc.create("stride", layout=layout).select(view))
    for (height, width), numbers in zip(SHAPES, found, strict=True):
        keep = view.budget.tokens(height * width)
        plain = plain_grid(height, width, keep) if layout == "grid" else plain_sequence(height * width, keep)
        assert numbers == plain
        assert len(numbers) == keep


def test_a_square_share_of_a_square_is_a_lattice(make_view: Any, kept: Any) -> None:
    view = make_view([(24, 24)], retention=1 / 9)
    numbers = kept(view, vtc.create("stride").select(view))[0]
    assert {n // 24 for n in numbers} == set(range(1, 24, 3))
    assert {n % 24 for n in numbers} == set(range(1, 24, 3))
    sequence = kept(view, vtc.create("stride", layout="sequence").select(view))[0]
    assert {b - a for a, b in itertools.pairwise(sequence)} == {9}


def test_sequences_drop_whole_columns_and_grids_do_not(make_view: Any, kept: Any) -> None:
    view = make_view([(12, 12)], retention=0.25)
    columns = lambda layout: {n % 12 for n in kept(view, vtc.create("stride", layout=layout).select(view))[0]}  # noqa: E731
    assert len(columns("sequence")) == 3
    assert len(columns("grid")) == 6


def test_frames_are_stacked_and_rasters_share(make_view: Any, kept: Any, shares: Any, shape: Any) -> None:
    shapes = [shape(((4, 3, 5),)), shape(((1, 4, 4), (1, 6, 7)), newlines=True)]
    view = make_view(shapes, keep=21)
    video, image = kept(view, vtc.create("stride").select(view))
    assert video == plain_grid(12, 5, 21)
    thumbnail, stitched = shares(21 - 6, (16, 42))
    expected = plain_grid(4, 4, thumbnail) + [16 + place // 7 * 8 + place % 7 for place in plain_grid(6, 7, stitched)]
    assert image == expected


def test_sequences_pass_over_newlines(make_view: Any, kept: Any, shape: Any) -> None:
    view = make_view([shape(((1, 4, 4), (1, 6, 7)), newlines=True)], keep=21)
    layout = view.items.layouts[0]
    real = [token for token in range(layout.n_tokens) if not layout.newline[token]]
    found = kept(view, vtc.create("stride", layout="sequence").select(view))[0]
    assert found == [real[place] for place in plain_sequence(len(real), 15)]


def test_items_without_rasters_are_sequences(make_view: Any, kept: Any) -> None:
    view = make_view([(7, 9)], keep=10)
    object.__setattr__(view.items.layouts[0], "grid", None)
    object.__setattr__(view.items.layouts[0], "regions", ())
    assert kept(view, vtc.create("stride").select(view))[0] == plain_sequence(63, 10)


def test_defaults_and_refusals(clip: Any) -> None:
    assert vtc.create("stride").layout == "grid"
    with pytest.raises(VTCError, match=r"unknown layout 'grd'; did you mean 'grid'.*Known layouts: grid, sequence"):
        vtc.create("stride", layout="grd")
    with vtc.compress(clip, "stride", retention=0.25) as handle, torch.no_grad():
        clip(input_ids=torch.tensor([[5] + [120] * 16 + [6]]), pixel_values=torch.zeros(1, 3, 28, 28))
    assert handle.plan == vtc.Plan((vtc.PRE_LLM,), vtc.Needs(), "compact")
    assert handle.trace[0].items[0].kept[0].tolist() == [5, 7, 13, 15]
