"""The batched functions against slow plain ones, on odd sizes, ties and extreme budgets; and without host traffic."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import math
import pkgutil
from collections.abc import Callable
from fractions import Fraction
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc.ops
from vtc.ops import blocks, nearest
from vtc.ops.attention import attention_received, attention_rows, attention_sums
from vtc.ops.checks import numbers
from vtc.ops.grid import (
    absorbing_cell,
    cell_centres,
    frame_lines,
    output_grid,
    output_raster,
    pool_grid,
    split_budget,
    strided,
)
from vtc.ops.hashing import fingerprint, joint_fingerprint, uniform
from vtc.ops.host import put
from vtc.ops.merge import best_match, merge_step
from vtc.ops.pagerank import attention_mass
from vtc.ops.select import (
    apportion,
    apportion_host,
    first_best,
    front_pack,
    in_groups,
    left_pack,
    out_of_groups,
    settle,
    take_last,
    take_rows,
    top_k,
)
from vtc.testing.plain import op_cases
from vtc.testing.plain.attention import plain_rows, plain_sums

SCORES = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 0.5, 1.0, math.inf])  # few values: ties everywhere
SIDES = st.integers(1, 13)


@st.composite
def matrices(draw: st.DrawFn, elements: Any, rows: int = 3, columns: int = 9) -> list[list[Any]]:
    width = draw(st.integers(1, columns))
    return draw(st.lists(st.lists(elements, min_size=width, max_size=width), min_size=1, max_size=rows))


def best(scores: list[float], allowed: list[int], keep: int) -> list[int]:
    """The `keep` best of the allowed places: higher score first, then lower place."""
    return sorted(sorted(allowed, key=lambda place: (-scores[place], place))[: max(0, keep)])


def places(marks: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in marks]


# --- choosing
@given(matrices(SCORES), st.data())
def test_top_k(scores: list[list[float]], data: st.DataObject) -> None:
    width = len(scores[0])
    keep = data.draw(st.lists(st.integers(0, width + 2), min_size=len(scores), max_size=len(scores)))
    mask = data.draw(
        st.none()
        | st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=len(scores), max_size=len(scores))
    )
    allowed = [[p for p in range(width) if mask is None or mask[row][p]] for row in range(len(scores))]
    found = top_k(torch.tensor(scores), torch.tensor(keep), None if mask is None else torch.tensor(mask))
    assert found.dtype == torch.bool
    assert places(found) == [best(*each) for each in zip(scores, allowed, keep, strict=True)]


def largest_remainders(total: int, sizes: list[int]) -> list[int]:
    whole = max(1, sum(sizes))
    exact = [Fraction(size * total, whole) for size in sizes]
    share = [math.floor(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda g: (share[g] - exact[g], g))
    for group in order[: total - sum(share)]:
        share[group] += 1
    return share


@given(matrices(st.integers(0, 30)), st.data())
def test_apportion(sizes: list[list[int]], data: st.DataObject) -> None:
    total = [data.draw(st.integers(0, sum(row))) for row in sizes]
    found = apportion(torch.tensor(total), torch.tensor(sizes)).tolist()
    assert found == [largest_remainders(*each) for each in zip(total, sizes, strict=True)]
    assert found == [apportion_host(*each) for each in zip(total, sizes, strict=True)]  # the same on the host
    for row, count, share in zip(sizes, total, found, strict=True):
        assert sum(share) == count
        assert all(0 <= s <= size for s, size in zip(share, row, strict=True))


@given(matrices(SCORES), st.data())
def test_the_best_of_groups(scores: list[list[float]], data: st.DataObject) -> None:
    rows, width, groups = len(scores), len(scores[0]), 3
    draw = lambda elements: data.draw(  # noqa: E731
        st.lists(st.lists(elements, min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
    group, mask = draw(st.integers(0, groups - 1)), draw(st.booleans())
    keep = [data.draw(st.integers(0, sum(row))) for row in mask]
    place, real = in_groups(torch.tensor(group), groups, width, torch.tensor(mask))
    shares = apportion(torch.tensor(keep), real.sum(2)).flatten()
    laid = torch.tensor(scores).gather(1, place.flatten(1)).view(-1, width)
    marks = top_k(laid, shares, real.flatten(0, 1), most=int(shares.max())).view_as(place)
    found = places(out_of_groups(marks, place, real, width))
    for row in range(rows):
        members = [[p for p in range(width) if mask[row][p] and group[row][p] == g] for g in range(groups)]
        share = largest_remainders(keep[row], [len(m) for m in members])
        expected = [p for m, count in zip(members, share, strict=True) for p in best(scores[row], m, count)]
        assert found[row] == sorted(expected)


# --- gathering
@given(matrices(st.booleans()), st.data())
def test_packing(keep: list[list[bool]], data: st.DataObject) -> None:
    width, longest = len(keep[0]), max(map(sum, keep))
    length = data.draw(st.integers(longest, width))
    marks = torch.tensor(keep)
    left, front = left_pack(marks, length), front_pack(marks, length)
    assert left.shape == front.shape == (len(keep), length)
    for row, kept in enumerate(places(marks)):
        assert left[row, length - len(kept) :].tolist() == kept
        assert front[row, : len(kept)].tolist() == kept
        assert not set(left[row, : length - len(kept)].tolist()) & set(kept)
        assert not set(front[row, len(kept) :].tolist()) & set(kept)


@pytest.mark.parametrize("tail", [(), (3,), (2, 3)])
def test_taking_rows(tail: tuple[int, ...]) -> None:
    x, index = torch.randn(2, 5, *tail), torch.tensor([[4, 0, 0], [1, 2, 3]])
    expected = torch.stack([torch.stack([x[b, i] for i in row]) for b, row in enumerate(index.tolist())])
    assert torch.equal(take_rows(x, index), expected)


@pytest.mark.parametrize("head", [(), (3,), (2, 3)])
def test_taking_along_the_last_axis(head: tuple[int, ...]) -> None:
    x, index = torch.randn(*head, 2, 5), torch.tensor([[4, 0, 0], [1, 2, 3]])
    found = take_last(x, index)
    assert found.shape == (*head, 2, 3)
    for b, row in enumerate(index.tolist()):
        for slot, place in enumerate(row):
            assert torch.equal(found[..., b, slot], x[..., b, place])


# --- rasters
def plain_output_grid(height: int, width: int, keep: int) -> tuple[int, int]:
    """Of all rasters within the budget: filled by nine tenths and at most 2:1 distorted, then square, then full."""
    rasters = [(h, w) for h in range(1, height + 1) for w in range(1, width + 1) if h * w <= keep]
    skew = {r: abs(math.log(r[0] * width / (r[1] * height))) for r in rasters}
    shaped = [r for r in rasters if skew[r] <= math.log(2) + 1e-9] or rasters
    full = [r for r in shaped if 10 * r[0] * r[1] >= 9 * keep]
    if not full:
        most = max(r[0] * r[1] for r in shaped)
        full = [r for r in shaped if r[0] * r[1] == most]
    return min(full, key=lambda r: (round(skew[r], 9), -r[0] * r[1]))


@given(SIDES, SIDES, st.data())
def test_output_grid(height: int, width: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, height * width))
    h, w = output_grid(height, width, keep)
    assert 1 <= h <= height
    assert 1 <= w <= width
    assert h * w <= keep
    expected = plain_output_grid(height, width, keep)
    skew = lambda r: abs(math.log(r[0] * width / (r[1] * height)))  # noqa: E731
    assert (h * w, round(skew((h, w)), 6)) == (expected[0] * expected[1], round(skew(expected), 6))


def test_output_grid_of_everything_is_the_input() -> None:
    for height in range(1, 25):
        for width in range(1, 25):
            assert output_grid(height, width, height * width) == (height, width)
            assert output_grid(height, width, 1) == (1, 1)


@given(st.integers(1, 5), SIDES, SIDES, st.data())
def test_output_raster_of_videos(frames: int, height: int, width: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, frames * height * width))
    raster = output_raster((frames, height, width), keep)
    assert math.prod(raster) <= keep
    if keep < frames:
        assert raster == (keep, 1, 1)
    else:
        assert raster == (frames, *output_grid(height, width, keep // frames))


def plain_stride(height: int, width: int, keep: int) -> list[int]:
    """Rows first: about sqrt(keep) centred rows share the tokens evenly, in each the columns are centred."""
    rows = max(1, math.floor(height * math.sqrt(keep / (height * width)) + 0.5), math.ceil(keep / width))
    rows = min(height, rows)
    chosen: list[int] = []
    slots = [j * rows // keep for j in range(keep)]
    for slot in range(rows):
        held = slots.count(slot)
        row = math.floor((slot + 0.5) * height / rows)
        chosen += [row * width + math.floor((i + 0.5) * width / held) for i in range(held)]
    return chosen


@given(SIDES, SIDES, st.data())
def test_strided(height: int, width: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, height * width))
    found = strided(height, width, keep).tolist()
    assert found == plain_stride(height, width, keep)
    assert len(found) == keep
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] < height * width
    counts = [sum(place // width == row for place in found) for row in range(height)]
    assert max(counts) - min(count for count in counts if count) <= 1


@given(st.integers(1, 700), st.data())
def test_strided_sequences_follow_the_card(tokens: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    assert strided(1, tokens, keep).tolist() == [(2 * j + 1) * tokens // (2 * keep) for j in range(keep)]


@given(st.lists(st.tuples(st.integers(1, 3), SIDES, SIDES), min_size=1, max_size=3), st.data())
def test_split_budget(regions: list[tuple[int, int, int]], data: st.DataObject) -> None:
    sizes = [math.prod(region) for region in regions]
    keep = data.draw(st.integers(1, sum(sizes)))
    share = largest_remainders(keep, sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    assert split_budget(regions, keep) == [each for each in zip(starts, regions, share, strict=True) if each[2]]


def cells(size: int, parts: int) -> list[range]:
    """The cells of adaptive pooling; neighbours overlap where `parts` does not divide `size`."""
    return [range(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


@st.composite
def rasters(draw: st.DrawFn) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    grid = (draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    frames = draw(st.sampled_from([grid[0], draw(st.integers(1, grid[0]))]))
    return grid, (frames, draw(st.integers(1, grid[1])), draw(st.integers(1, grid[2])))


@given(rasters())
def test_pool_grid(shapes: Any) -> None:
    grid, output = shapes
    tokens = torch.randn(2, math.prod(grid), 3, generator=torch.Generator().manual_seed(0))
    volume = tokens.reshape(2, *grid, 3)
    expected = [
        volume[:, list(f)][:, :, list(r)][:, :, :, list(c)].mean((1, 2, 3))
        for f in cells(grid[0], output[0])
        for r in cells(grid[1], output[1])
        for c in cells(grid[2], output[2])
    ]
    found = pool_grid(tokens, grid, output)
    assert found.shape == (2, math.prod(output), 3)
    assert torch.allclose(found, torch.stack(expected, dim=1), atol=1e-6)
    assert pool_grid(tokens.bfloat16(), grid, output).dtype == torch.bfloat16


@given(rasters())
def test_cells_and_their_centres(shapes: Any) -> None:
    grid, output = shapes
    centres = cell_centres(grid, output).tolist()
    assert centres == sorted(set(centres))
    assert len(centres) == math.prod(output)
    absorbed = absorbing_cell(grid, output).tolist()
    assert len(absorbed) == math.prod(grid)

    def inside(token: int) -> list[int]:
        """All cells a token lies in."""
        where = [token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]]
        per_axis = [
            [i for i, cell in enumerate(cells(size, parts)) if place in cell]
            for size, parts, place in zip(grid, output, where, strict=True)
        ]
        return [(f * output[1] + r) * output[2] + c for f in per_axis[0] for r in per_axis[1] for c in per_axis[2]]

    for cell, centre in enumerate(centres):
        assert cell in inside(centre)
    for token, cell in enumerate(absorbed):
        assert cell in inside(token)


def test_a_centre_is_absorbed_by_its_own_cell() -> None:
    """The token whose place a pooled row takes counts as absorbed by that row, also where cells overlap."""
    wrong = [
        (size, parts)
        for size in range(1, 28)
        for parts in range(1, size + 1)
        if absorbing_cell((1, 1, size), (1, 1, parts))[cell_centres((1, 1, size), (1, 1, parts))].tolist()
        != list(range(parts))
    ]
    assert wrong == []


# --- random numbers
def test_random_numbers_are_uniform() -> None:
    keys = torch.arange(64) * 7919 + 3
    draw = uniform(keys, torch.arange(576).expand(64, -1), seed=0)
    assert draw.dtype == torch.float32
    assert float(draw.min()) >= 0
    assert float(draw.max()) < 1
    counts = torch.histc(draw, bins=32, min=0, max=1)
    expected = draw.numel() / 32
    assert float(((counts - expected) ** 2 / expected).sum()) < 70  # chi square with 31 degrees: p = 8e-5
    assert abs(float(draw.mean()) - 0.5) < 5 / math.sqrt(12 * draw.numel())


@pytest.mark.parametrize("shift", ["next token", "next item", "next seed"])
def test_random_numbers_are_independent(shift: str) -> None:
    keys, token = torch.arange(64), torch.arange(576).expand(64, -1)
    first = uniform(keys, token, 0)
    other = {
        "next token": uniform(keys, token + 1, 0),
        "next item": uniform(keys + 1, token, 0),
        "next seed": uniform(keys, token, 1),
    }[shift]
    correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(first.numel())


@pytest.mark.parametrize(("tokens", "keep"), [(16, 4), (63, 7), (577, 64)])
def test_random_subsets_are_uniform(tokens: int, keep: int) -> None:
    """Every token, and every pair of neighbours, is kept as often as chance says."""
    items = 4000
    draw = uniform(torch.arange(items) * 2654435761, torch.arange(tokens).expand(items, -1), seed=5)
    kept = top_k(draw, torch.full((items,), keep)).float()
    assert bool((kept.sum(1) == keep).all())
    share = keep / tokens
    spread = math.sqrt(share * (1 - share) / items)
    assert float((kept.mean(0) - share).abs().max()) < 5 * spread
    pairs = (kept[:, 1:] * kept[:, :-1]).mean(0)
    expected = share * (keep - 1) / (tokens - 1)
    assert float((pairs - expected).abs().max()) < 5 * math.sqrt(expected / items)


def test_random_numbers_depend_on_item_token_and_seed_only() -> None:
    keys, token = torch.tensor([5, 9, 11]), torch.arange(20).expand(3, -1)
    whole = uniform(keys, token, 3)
    assert torch.equal(uniform(keys[[2, 0]], token[[2, 0]], 3), whole[[2, 0]])
    assert torch.equal(uniform(keys[1:2], token[1:2, 7:], 3), whole[1:2, 7:])
    assert torch.equal(uniform(keys, token.int(), 3), whole)
    assert not torch.equal(uniform(keys, token, 4), whole)
    assert len({tuple(row.tolist()) for row in whole}) == 3


def test_the_numbers_themselves_do_not_drift() -> None:
    """Stored results of random pruning stay comparable only as long as these values stay."""
    draw = uniform(torch.tensor([0, 123456789]), torch.arange(3).expand(2, -1), seed=1)
    assert (draw * (1 << 24)).long().tolist() == [[7457475, 6651287, 6369862], [1439667, 3380564, 2990827]]
    assert fingerprint(torch.arange(6).reshape(2, 3)).tolist() == [6853188463554983012, -998287507722607653]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64])
def test_fingerprints_are_keys_of_the_bits(dtype: torch.dtype) -> None:
    images = (torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 200).to(dtype)
    images[3] = images[0]
    keys = fingerprint(images)
    assert (keys.dtype, keys.shape) == (torch.int64, (4,))
    assert len(set(keys.tolist())) == 3
    assert keys[3] == keys[0]
    for i in range(4):
        assert fingerprint(images[i : i + 1]) == keys[i]
    assert torch.equal(fingerprint(images.clone().contiguous(memory_format=torch.channels_last)), keys)
    swapped = images.flatten(1)[:, torch.cat([torch.tensor([1, 0]), torch.arange(2, 243)])]
    assert bool((fingerprint(swapped) != keys).all())


def test_noise_breaks_no_tie() -> None:
    """Whatever the last bits say, equal scores go to the lower index; what differs by more keeps its order."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randint(1, 6, (50, 40), generator=generator).float() * torch.tensor([[1e-6], [1.0]]).repeat(25, 1)
    noisy = exact * (1 + 2e-7 * torch.rand(exact.shape, generator=generator))
    mask = torch.rand(exact.shape, generator=generator) < 0.8
    noisy = torch.where(mask, noisy, torch.nan)
    keep = torch.randint(1, 30, (50,), generator=generator)
    assert torch.equal(top_k(noisy, keep, mask), top_k(exact, keep, mask))
    large = torch.where(mask, noisy, 0.0)[25:]  # whole numbers and noise of the last places
    assert torch.equal(first_best(large, 1e-5), first_best(exact.where(mask, 0.0)[25:], 1e-5))
    settled = settle(noisy, mask)
    assert all(len(row.unique()) <= 6 for row in settled)
    assert bool((settled - noisy.masked_fill(~mask, -torch.inf)).nan_to_num(0.0).abs().le(1e-5).all())


def test_fingerprints_of_large_images_differ() -> None:
    images = torch.randn(3, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    images[1], images[2] = images[0].flip(-1), images[0] * (1 + 1e-6)
    assert len(set(fingerprint(images).tolist())) == 3


def test_joint_fingerprints() -> None:
    keys = torch.tensor([3, 5, 7, 5, 3, 9])
    found = joint_fingerprint(keys, [2, 1, 2, 1]).tolist()
    assert len(set(found)) == 4  # the order inside a run counts
    assert joint_fingerprint(keys[:2], [2]).tolist() == found[:1]
    assert joint_fingerprint(torch.tensor([9, 3, 5]), [1, 2]).tolist() == [found[3], found[0]]


# --- attention
def plain_attention(q: Tensor, k: Tensor, scaling: float, visible: Tensor, bias: Tensor) -> Tensor:
    """[B, H, Q, K] weights, one number at a time but for the dot products; the keys' head is shared by neighbours."""
    batch, heads, queries, _ = q.shape
    weights = torch.zeros(batch, heads, queries, k.shape[2])
    for b in range(batch):
        for h in range(heads):
            shared = k[b, h * k.shape[1] // heads]
            for i in range(queries):
                logits = (shared @ q[b, h, i]).double() * scaling + bias[b, h, i]
                power = torch.where(visible[b, h, i], (logits - logits[visible[b, h, i]].max()).exp(), 0.0)
                weights[b, h, i] = power / power.sum()
    return weights


MASKS = ["none", "bool 4D", "bool 4D per head", "additive", "2D"]


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 8), (1, 5)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_rows(queries: int, keys: int, groups: int, causal: bool, kind: str, limits: Any) -> None:
    g = torch.Generator().manual_seed(queries + keys)
    q, k = torch.randn(2, 6, queries, 4, generator=g), torch.randn(2, groups, keys, 4, generator=g)
    allowed = torch.rand(2, 6, queries, keys, generator=g) < 0.7
    allowed[..., 0] = True
    bias, mask = torch.zeros(2, 6, queries, keys), None
    visible = torch.ones(2, 6, queries, keys, dtype=torch.bool)
    if kind == "bool 4D":
        mask = allowed[:, :1]
        visible = mask.expand_as(visible)
    elif kind == "bool 4D per head":
        visible = mask = allowed
    elif kind == "additive":
        bias = torch.randn(2, 1, queries, keys, generator=g).expand_as(bias)
        mask = bias[:, :1]
    elif kind == "2D":
        mask = allowed[:, 0, 0]
        visible = mask[:, None, None].expand_as(visible)
    if causal:
        visible = visible & (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries)
    weights = plain_attention(q, k, 0.7, visible, bias).mean(1)
    rows = torch.tensor([[queries - 1, 0, queries // 2], [0, 0, queries - 1]])
    expected = torch.stack([weights[b, rows[b]] for b in range(2)])
    for chunk in (1, 2, 256):
        found = attention_rows(q, k, rows, 0.7, mask=mask, causal=causal, chunk=chunk)
        assert float((found - expected).abs().max()) <= limits.attention
    if not causal:
        received = attention_received(q, k, 0.7, mask=mask, chunk=2)
        assert float((received - weights.mean(1)).abs().max()) <= limits.attention
    share = torch.rand(2, 2, queries, generator=g)
    for chunk in (1, 2, None):
        found = attention_sums(q, k, share, 0.7, mask=mask, causal=causal, chunk=chunk)
        expected = torch.einsum("gbq,bqk->gbk", share, weights)
        assert float((found - expected).abs().max()) <= limits.attention * queries


@pytest.mark.parametrize("heads", ["mean", "max", "groups"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_of_heads_and_of_their_groups(groups: int, heads: Any, limits: Any) -> None:
    g = torch.Generator().manual_seed(groups)
    q, k = torch.randn(2, 4, 6, 8, generator=g), torch.randn(2, groups, 7, 8, generator=g)
    mask = torch.arange(7) >= torch.tensor([[1], [0]])
    rows, weights = torch.randint(6, (2, 3), generator=g), torch.rand(2, 2, 6, generator=g)
    given = {"scaling": 0.4, "mask": mask, "causal": True, "heads": heads}
    shape = (2, groups, 3, 7) if heads == "groups" else (2, 3, 7)
    for op, plain, more in ((attention_rows, plain_rows, rows), (attention_sums, plain_sums, weights)):
        found = op(q, k, more, chunk=2, **given)
        assert float((found - plain(q, k, more, **given)).abs().max()) <= limits.attention * 6
        assert op is attention_sums or found.shape == shape


def test_a_longer_mask_is_cut_to_the_keys(limits: Any) -> None:
    """Masks may be longer than the keys: 4D ones behind the end, 2D ones in front."""
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    seen = torch.tensor([[True, False, True, True, False]])
    rows = torch.tensor([[0, 2]])
    expected = attention_rows(q, k, rows, 0.5, mask=seen)
    four = torch.nn.functional.pad(seen, (0, 3), value=True)[:, None, None].expand(1, 1, 3, 8)
    two = torch.nn.functional.pad(seen, (3, 0), value=True)
    assert float((attention_rows(q, k, rows, 0.5, mask=four) - expected).abs().max()) <= limits.attention
    assert float((attention_rows(q, k, rows, 0.5, mask=two) - expected).abs().max()) <= limits.attention
    sums = [attention_sums(q, k, torch.ones(1, 1, 3), 0.5, mask=each, causal=True) for each in (seen, four, two)]
    assert float((sums[1] - sums[0]).abs().max()) <= limits.attention
    assert float((sums[2] - sums[0]).abs().max()) <= limits.attention


@pytest.mark.parametrize("lengths", [[5], [3, 3, 2], [1, 4, 1, 4, 7]])
def test_received_attention_in_segments(lengths: list[int], limits: Any) -> None:
    q, k = torch.randn(1, 4, sum(lengths), 3), torch.randn(1, 2, sum(lengths), 3)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    parts = [attention_received(q[:, :, a:b], k[:, :, a:b], 0.6) for a, b in itertools.pairwise(ends.tolist())]
    found = attention_received(q, k, 0.6, segments=ends, chunk=3)
    assert float((found - torch.cat(parts, dim=1)).abs().max()) <= limits.attention


def test_attention_is_float32_whatever_comes_in() -> None:
    q, k = torch.randn(1, 2, 4, 8).bfloat16(), torch.randn(1, 2, 4, 8).bfloat16()
    rows = attention_rows(q, k, torch.tensor([[3]]), 0.5)
    assert rows.dtype == attention_received(q, k, 0.5).dtype == torch.float32
    assert abs(float(rows.sum()) - 1) < 1e-5


# --- no host traffic
def example(*shape: int, high: int = 0) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % high if high else torch.ones(shape)


MARKS = torch.tensor([[True, False, True, True], [False, True, True, False]])
EXAMPLES: dict[str, Callable[[], Any]] = {
    "attention_rows": lambda: attention_rows(example(2, 4, 5, 3), example(2, 2, 5, 3), example(2, 2, high=5), 0.5),
    "attention_received": lambda: attention_received(example(2, 4, 5, 3), example(2, 2, 5, 3), 0.5),
    "attention_mass": lambda: attention_mass(example(2, 4, 5, 3), example(2, 2, 5, 3), 0.5, torch.full((2, 5), 0.2)),
    "strided": lambda: strided(4, 5, 7),
    "pool_grid": lambda: pool_grid(example(2, 24, 3), (2, 4, 3), (2, 2, 2)),
    "cell_centres": lambda: cell_centres((2, 4, 3), (2, 2, 2)),
    "absorbing_cell": lambda: absorbing_cell((2, 4, 3), (2, 2, 2)),
    "frame_lines": lambda: torch.stack(frame_lines([(2, 4, 3), (1, 2, 2)])),
    "fingerprint": lambda: fingerprint(example(2, 3, 5)),
    "joint_fingerprint": lambda: joint_fingerprint(example(5, high=3), [2, 3]),
    "uniform": lambda: uniform(example(2, high=9), example(2, 4, high=4), 3),
    "blocks": lambda: torch.cat([torch.cat(pair, 2) for pair in blocks.blocks(example(2, 4, 3), example(2, 4, 1))]),
    "put": lambda: put([[3, 1], [0, 2]], torch.device("cpu")),
    "numbers": lambda: numbers(example(2, 4), MARKS),
    "settle": lambda: settle(example(2, 4), MARKS),
    "first_best": lambda: first_best(example(2, 4)),
    "top_k": lambda: top_k(example(2, 4), torch.tensor([1, 3]), MARKS),
    "apportion": lambda: apportion(torch.tensor([3, 5]), torch.tensor([[4, 2], [3, 3]])),
    "left_pack": lambda: left_pack(MARKS, 3),
    "front_pack": lambda: front_pack(MARKS, 3),
    "take_rows": lambda: take_rows(example(2, 4, 3), torch.tensor([[1, 2], [0, 3]])),
    "take_last": lambda: take_last(example(3, 2, 4), torch.tensor([[1, 2], [0, 3]])),
}


def public_functions() -> dict[str, Any]:
    """Every public function of vtc.ops that returns a tensor."""
    found = {}
    for info in pkgutil.iter_modules(vtc.ops.__path__):
        module = importlib.import_module(f"vtc.ops.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "Tensor" in str(get_type_hints(function).get("return")):
                found[f"{info.name}.{name}"] = function
    return found


def flat(value: Any) -> list[Any]:
    """The tensors and numbers in a result, in order."""
    if dataclasses.is_dataclass(value):
        return [leaf for f in dataclasses.fields(value) for leaf in flat(getattr(value, f.name))]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in flat(part)]
    return [value]


def same(found: Any, expected: Any, tolerance: float) -> bool:
    pairs = list(zip(flat(found), flat(expected), strict=True))
    for ours, theirs in pairs:
        if not isinstance(ours, Tensor):
            assert ours == theirs
        elif ours.shape != theirs.shape:
            return False
        elif tolerance == 0.0 or not ours.is_floating_point():
            if not torch.equal(ours, theirs.to(ours.dtype)):
                return False
        elif float((ours.double() - theirs.double()).abs().max()) > tolerance * float(theirs.abs().max()):
            return False
    return bool(pairs)


def test_every_function_has_an_example() -> None:
    known = {name.split(".")[1] for name in op_cases()} | set(EXAMPLES) | {"walk"}  # of kernels: test_triton.py
    assert known >= {name.split(".")[1] for name in public_functions()}


@pytest.mark.parametrize("name", ["total", "alignments", "lengths", "distances", "likeness"])
def test_small_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in op_cases().values() if case.op.__name__ == name)
    assert case.plain is not None
    given = case.make("small")
    monkeypatch.setattr(blocks, "CACHED", 100)
    assert same(case.op(**given), case.plain(**given), case.tolerance)


def test_means_of_few_are_those_of_many() -> None:
    """Told how many tokens stay, only their rows are made."""
    given = op_cases()["nearest.means"].make("small")
    stays = given["into"] == torch.arange(given["into"].shape[1])
    found = nearest.means(**given, most=int(stays.sum(1).max()))
    assert stays.any() and torch.allclose(found[stays], nearest.means(**given)[stays])


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_function_asks_the_host_or_breaks_the_graph(name: str) -> None:
    """fullgraph raises on .item(), .tolist(), nonzero() and everything else that depends on values."""
    torch._dynamo.reset()
    compiled = torch.compile(EXAMPLES[name], fullgraph=True, backend="eager")()
    assert torch.equal(compiled, EXAMPLES[name]())


@pytest.mark.parametrize("name", op_cases())
def test_no_case_asks_the_host_or_breaks_the_graph(name: str) -> None:
    case = op_cases()[name]
    given = case.make("small")
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, backend="eager")
    assert same(compiled(**given), case.op(**given), 0.0)


@pytest.mark.parametrize("name", [name for name, case in op_cases().items() if case.plain])
def test_cases_equal_their_plain_reference(name: str) -> None:
    case = op_cases()[name]
    assert case.plain is not None
    given = case.make("small")
    assert same(case.op(**given), case.plain(**given), case.tolerance)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_that_only_rounding_tells_apart_merge_in_the_order_of_their_places(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ones = torch.randn(1, 24, 96, generator=generator)
    scaled = ones * (0.3 + 3 * torch.rand(1, 24, 1, generator=generator))
    target, anchor = merge_step(torch.stack([ones, scaled], 2).view(1, 48, 96), [48], [8])
    gone = set(range(48)) - set(anchor[0].tolist())
    assert gone == set(range(0, 16, 2))
    assert torch.equal(target[0, 0:16:2], target[0, 1:16:2])


@pytest.mark.parametrize("seed", range(6))
def test_of_partners_that_only_rounding_tells_apart_the_first_is_taken(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(1, 1, 96, generator=generator)
    tokens = one * (0.3 + 3 * torch.rand(1, 41, 1, generator=generator))
    partner, _ = best_match(tokens, torch.tensor([41]))
    assert not partner.any()
    assert not nearest.nearest(tokens, tokens[:, 1:], torch.ones(1, 40, dtype=torch.bool)).any()


@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 4, 3), (3, 6, 2, 4)])
def test_rows_are_taken_of_any_layout(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator)
    index = torch.randint(shape[1], (shape[0], 7), generator=generator)
    expected = torch.stack([row[at] for row, at in zip(rows, index, strict=True)])
    for laid in (rows, rows.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(take_rows(laid, index), expected)
    assert torch.equal(take_rows(rows[..., 0], index), expected[..., 0])
    assert take_rows(rows[:0], index[:0]).shape == (0, 7, *shape[2:])
    assert take_rows(rows[:, :0], index[:, :0]).shape == (shape[0], 0, *shape[2:])
