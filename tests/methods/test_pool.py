"""Adaptive average pooling against means over cells, one cell at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedCall
from vtc.ops.grid import output_raster
from vtc.testing import tiny_inputs

SHAPES = [(7, 9), (1, 1), (24, 24), (2, 3), (5, 13), (7, 9)]
BUDGETS = [{"retention": r} for r in (0.04, 0.25, 1 / 3, 0.5, 0.8)] + [{"keep": k} for k in (1, 2, 7, 64)]


def cell(size: int, parts: int, i: int) -> range:
    """Places that cell i of `parts` averages: floor(i * size / parts) up to ceil((i + 1) * size / parts)."""
    return range(math.floor(i * size / parts), math.ceil((i + 1) * size / parts))


def plain_pool(tokens: Tensor, grid: tuple[int, int, int], output: tuple[int, int, int]) -> dict[int, Tensor]:
    """Token in the middle of every cell -> mean of the cell."""
    pooled: dict[int, Tensor] = {}
    for f in range(output[0]):
        for r in range(output[1]):
            for c in range(output[2]):
                ranges = [cell(*each) for each in zip(grid, output, (f, r, c), strict=True)]
                members = [(a * grid[1] + b) * grid[2] + d for a in ranges[0] for b in ranges[1] for d in ranges[2]]
                middle = [(2 * i + 1) * size // (2 * n) for i, size, n in zip((f, r, c), grid, output, strict=True)]
                place = (middle[0] * grid[1] + middle[1]) * grid[2] + middle[2]
                pooled[place] = tokens[members].mean(0)
    return pooled


def check(view: Any, selection: Any, item: int, real: list[int], expected: dict[int, Tensor]) -> None:
    """Item `item` keeps exactly the expected tokens (numbers among the `real` ones) with the expected rows."""
    assert view.items.token[item][selection.keep[item] & view.items.mask[item]].tolist() == [
        real[place] for place in sorted(expected)
    ]
    for place, row in expected.items():
        assert torch.allclose(selection.tokens[item, place], row, atol=1e-6)
    into = selection.merged_into[item]
    assert sorted(set(into[: len(real)].tolist())) == sorted(expected)
    assert into[sorted(expected)].tolist() == sorted(expected)  # a kept place is its own


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_plain_means(make_view: Any, kept: Any, budget: Any) -> None:
    view = make_view(SHAPES, **budget)
    selection = vtc.create("pool").select(view)
    kept(view, selection)
    for item, (height, width) in enumerate(SHAPES):
        count = view.budget.tokens(height * width)
        output = output_raster((1, height, width), count)
        expected = plain_pool(view.tokens[item, : height * width], (1, height, width), output)
        assert len(expected) <= count
        check(view, selection, item, list(range(height * width)), expected)


@pytest.mark.parametrize("factor", [2, 3, 4, 6])
def test_integer_windows_are_plain_average_pooling(make_view: Any, factor: int) -> None:
    view = make_view([(12, 12)], retention=1 / factor**2)
    selection = vtc.create("pool").select(view)
    grid = view.tokens[0].reshape(12, 12, -1).movedim(-1, 0)[None]
    expected = torch.nn.functional.avg_pool2d(grid, factor)[0].flatten(1).T
    assert torch.allclose(selection.tokens[0][selection.keep[0]], expected, atol=1e-6)
    assert torch.equal(
        selection.merged_into[0].reshape(12, 12)[::factor, ::factor].flatten(), selection.keep[0].nonzero()[:, 0]
    )


def test_videos_are_pooled_frame_by_frame(make_view: Any, kept: Any, shape: Any) -> None:
    view = make_view([shape(((3, 4, 6),))], keep=18)
    selection = vtc.create("pool").select(view)
    kept(view, selection)
    check(view, selection, 0, list(range(72)), plain_pool(view.tokens[0], (3, 4, 6), (3, 2, 3)))


def test_frames_are_averaged_where_they_outnumber_the_budget(make_view: Any, kept: Any, shape: Any) -> None:
    view = make_view([shape(((4, 2, 3),))], keep=2)
    selection = vtc.create("pool").select(view)
    kept(view, selection)
    check(view, selection, 0, list(range(24)), plain_pool(view.tokens[0], (4, 2, 3), (2, 1, 1)))


def test_rasters_of_one_image_share_the_budget(make_view: Any, kept: Any, shares: Any, shape: Any) -> None:
    view = make_view([shape(((1, 4, 4), (1, 6, 7)), newlines=True), (4, 4)], keep=25)
    selection = vtc.create("pool").select(view)
    kept(view, selection)
    layout = view.items.layouts[0]
    real = [token for token in range(layout.n_tokens) if not layout.newline[token]]
    thumbnail, stitched = shares(25 - 6, (16, 42))
    first = plain_pool(view.tokens[0, :16], (1, 4, 4), output_raster((1, 4, 4), thumbnail))
    second = plain_pool(view.tokens[0, 16:58], (1, 6, 7), output_raster((1, 6, 7), stitched))
    check(view, selection, 0, real, first | {16 + place: row for place, row in second.items()})


def test_rows_that_are_not_kept_stay_out(clip: Any, limits: Any) -> None:
    """End to end: the LLM sees the means at the cells' centres, the text unchanged, in the prompt's order."""
    inputs = tiny_inputs("llava-clip", [[3, "image", 5], [2, "image", 4, "image"]])
    rows: list[Tensor] = []
    hook = clip.model.language_model.layers[0]
    with torch.no_grad():
        encoded = torch.stack(
            list(clip.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output)
        )
        text = clip.get_input_embeddings()(inputs["input_ids"])
        with vtc.compress(clip, "pool", retention=0.25) as handle:
            hook.register_forward_pre_hook(
                lambda module, args, kwargs: rows.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
            clip(**inputs)
    assert handle.stats.calls[0].visual_tokens_kept == (4.0, 8.0)
    means = encoded.reshape(3, 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    second = torch.cat([text[1, :2], means[1], text[1, 18:22], means[2]])
    first = torch.cat([text[0, -24:-21], means[0], text[0, -5:]])
    assert float((rows[0][1] - second).abs().max()) <= limits.hidden
    assert float((rows[0][0, -12:] - first).abs().max()) <= limits.hidden


def test_items_without_rasters_are_refused(make_view: Any) -> None:
    view = make_view([(7, 9)], keep=10)
    object.__setattr__(view.items.layouts[0], "regions", ())
    with pytest.raises(UnsupportedCall, match="pool needs items whose tokens form full rasters; choose another method"):
        vtc.create("pool").select(view)


def test_defaults(clip: Any) -> None:
    with vtc.compress(clip, "pool", keep=4) as handle:
        assert handle.plan == vtc.Plan((vtc.PRE_LLM,), vtc.Needs(), "compact")
