"""Bipartite merging and PageRank importance: against the plain references, at odd sizes, with ties, at full size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vtc.ops import merge as ops
from vtc.ops.pagerank import pagerank
from vtc.testing.plain import importance as plain_importance
from vtc.testing.plain import merge as plain

COUNTS = st.lists(st.integers(1, 13), min_size=1, max_size=4)
SEEDS = st.integers(0, 10**6)


def directions(counts: list[int], seed: int, ties: bool) -> Tensor:
    """[G, t, 5]: random vectors, or unit vectors, whose similarities are exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.eye(5)[torch.randint(3, (len(counts), max(counts)), generator=generator)]
    return torch.randn(len(counts), max(counts), 5, generator=generator)


# --- merging
@given(COUNTS, SEEDS, st.booleans(), st.sampled_from(["similarity", "index"]), st.integers(0, 1), st.data())
def test_one_step(counts: list[int], seed: int, ties: bool, order: Any, protected: int, data: Any) -> None:
    metric = directions(counts, seed, ties)
    merged = [data.draw(st.integers(0, (n - protected) // 2)) for n in counts]
    target, anchor = ops.merge_step(metric, counts, merged, order=order, protected=protected)
    expected = plain.merge_step(metric, counts, merged, order=order, protected=protected)
    assert torch.equal(target, expected[0])
    assert torch.equal(anchor, expected[1])


@given(COUNTS, SEEDS, st.booleans(), st.booleans(), st.data())
def test_all_steps(counts: list[int], seed: int, ties: bool, weighted: bool, data: Any) -> None:
    metric = directions(counts, seed, ties)
    plans = [ops.merge_plan(n, data.draw(st.integers(1, n))) for n in counts]
    size = torch.randint(1, 4, metric.shape[:2]).float() if weighted else None
    if ties:  # means of tied tokens are ambiguous in their last bit, so only what one step decides is compared
        plans = [plan[:1] for plan in plans]
    found = ops.bipartite_merge(metric, counts, plans, size=size)
    expected = plain.bipartite_merge(metric, counts, plans, size=size)
    assert torch.equal(found.target, expected.target)
    assert torch.equal(found.anchor, expected.anchor)
    assert torch.allclose(found.weight, expected.weight, atol=1e-6)
    assert torch.allclose(found.size, expected.size, atol=1e-4)
    assert found.counts == expected.counts == tuple(n - sum(plan) for n, plan in zip(counts, plans, strict=True))
    rows = ops.merge_rows(metric, found.target, found.weight, found.anchor.shape[1])
    assert torch.allclose(rows, plain.merge_rows(metric, found.target, found.weight, rows.shape[1]), atol=1e-6)


@given(st.integers(1, 400), st.data())
def test_the_general_plan(count: int, data: Any) -> None:
    keep = data.draw(st.integers(1, count))
    plan = ops.merge_plan(count, keep)
    for gone in plan:
        assert 0 < gone <= count // 2
        count -= gone
    assert count == keep


@pytest.mark.parametrize(
    ("count", "keep", "plan"),
    [
        (196, 49, [98, 49]),  # one frame of LLaVA-OneVision, 25 %
        (196, 74, [98, 24]),
        (196, 25, [98, 49, 24]),
        (196, 13, [98, 49, 24, 12]),
        (196, 7, [98, 49, 24, 12, 6]),
        (196, 4, [98, 49, 24, 12, 6, 3]),
        (576, 252, [288, 36]),  # LLaVA-1.5
        (576, 72, [288, 144, 72]),
        (49, 9, [24, 12, 4]),  # a 7 x 7 frame of Qwen2-VL, cut down to 3 x 3
        (5, 0, [2, 1, 1]),  # one is always left
    ],
)
def test_published_plans(count: int, keep: int, plan: list[int]) -> None:
    assert ops.merge_plan(count, keep) == plan


def test_a_step_takes_no_more_than_half() -> None:
    merge = ops.bipartite_merge(torch.randn(2, 9, 3), [9, 4], [[99, 1], [99]])
    assert merge.counts == (4, 2)


def test_sizes_and_weighted_sums_are_conserved() -> None:
    x, size = torch.randn(3, 65, 8).double(), torch.randint(1, 5, (3, 65)).float()
    merge = ops.bipartite_merge(x.float(), [65] * 3, [[20, 9]] * 3, size=size, order="index", protected=1)
    assert torch.allclose(merge.size.sum(1), size.sum(1))
    rows = ops.merge_rows(x, merge.target, merge.weight, merge.anchor.shape[1])
    totals = (rows * merge.size[..., None]).sum(1)
    assert torch.allclose(totals, (x * size[..., None]).sum(1), atol=1e-4)
    assert torch.equal(merge.target[:, 0], torch.zeros(3).long())  # the protected token stays alone in front
    assert bool((merge.size[:, 0] == size[:, 0]).all())


@pytest.mark.parametrize("block", [1, 100, 1000])
def test_blocks_change_nothing(monkeypatch: Any, block: int) -> None:
    metric = torch.randn(3, 63, 7)
    expected = ops.bipartite_merge(metric, [63, 40, 2], [[31, 10], [20], []])
    rows = ops.merge_rows(metric, expected.target, expected.weight, expected.anchor.shape[1])
    monkeypatch.setattr(ops, "BLOCK", block)
    found = ops.bipartite_merge(metric, [63, 40, 2], [[31, 10], [20], []])
    assert torch.equal(found.target, expected.target)
    assert torch.allclose(ops.merge_rows(metric, found.target, found.weight, len(rows[0])), rows, atol=1e-6)


def test_zero_vectors_are_similar_to_nobody() -> None:
    metric = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1]]])
    partner, similarity = ops.best_match(metric, torch.tensor([4]))
    assert partner.tolist() == [[0, 1]]
    assert similarity[0, 0] == 0
    assert similarity[0, 1] > 0.99


def test_half_precision_rows_are_summed_in_float32() -> None:
    x = torch.full((1, 512, 1), 1.0).bfloat16()
    rows = ops.merge_rows(x, torch.zeros(1, 512).long(), torch.full((1, 512), 1 / 512), 1)
    assert (rows.dtype, rows.item()) == (torch.bfloat16, 1.0)


def test_gradients_reach_what_is_averaged() -> None:
    x = torch.randn(2, 8, 3, requires_grad=True)
    merge = ops.bipartite_merge(x, [8, 8], [[4, 2], [4, 2]])
    ops.merge_rows(x, merge.target, merge.weight, 2).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, merge.weight[..., None].expand(-1, -1, 3))
    assert torch.allclose(merge.weight.sum(1), torch.tensor(2.0))


@pytest.mark.slow
def test_a_long_video_fits_into_memory(peak_memory: Any) -> None:
    """50k tokens as one group: half of the similarities alone would be 2.5 GB at once."""
    setup = "from vtc.ops.merge import bipartite_merge, merge_plan, merge_rows; x = torch.randn(1, 50000, 64)"
    code = "m = bipartite_merge(x, [50000], [[25000]]); merge_rows(x, m.target, m.weight, 25000)"
    assert peak_memory(setup, code) < 2**30


def test_the_frames_of_a_long_video_fit_into_memory(peak_memory: Any) -> None:
    setup = "from vtc.ops.merge import bipartite_merge, merge_plan, merge_rows; x = torch.randn(512, 196, 256)"
    code = "m = bipartite_merge(x, [196] * 512, [merge_plan(196, 49)] * 512); merge_rows(x, m.target, m.weight, 49)"
    assert peak_memory(setup, code) < 2**30


# --- importance
@given(
    st.integers(1, 9), st.integers(0, 4), st.sampled_from(["none", "2D", "bool", "additive"]), st.booleans(), SEEDS,
    st.sampled_from([0.1, 1.0]), st.sampled_from([0.0, 0.15]), st.booleans(),
)  # fmt: skip
def test_importance(
    length: int, before: int, kind: str, causal: bool, seed: int, tau: float, damping: float, keep: bool
) -> None:
    g = torch.Generator().manual_seed(seed)
    keys = length + before
    query, key = torch.randn(2, 4, length, 3, generator=g), torch.randn(2, 2, keys, 3, generator=g)
    seen = torch.rand(2, 1, length, keys, generator=g) < 0.7
    mask = {
        "none": None,
        "2D": seen[:, 0, 0],
        "bool": seen,
        "additive": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
    }[kind]
    voters = torch.rand(2, length, generator=g) < 0.8 if damping else None
    given: dict[str, Any] = {"tau": tau, "damping": damping, "mask": mask, "causal": causal, "voters": voters}
    found = pagerank(query, key, 0.6, block=2 * 4 * keys * 2, store=10**6 if keep else 0, **given)
    expected = plain_importance.pagerank(query, key, 0.6, **given)
    if kind == "additive":  # a query without keys: the plain softmax is over the added minimum, ours passes nothing on
        valid = seen & (torch.arange(keys) <= torch.arange(length)[:, None] + before) if causal else seen
        if not bool(valid.any(-1).all()):
            return
    assert torch.allclose(found, expected, atol=2e-6)


def test_mass_is_conserved_without_a_mask() -> None:
    q, k = torch.randn(1, 1, 50, 8), torch.randn(1, 1, 50, 8)
    assert abs(float(pagerank(q, k, 0.3).sum()) - 1) < 1e-5
    assert torch.allclose(pagerank(q, k, 0.3, iterations=0), torch.full((1, 50), 1 / 50))


def test_padding_neither_votes_nor_receives() -> None:
    q, k = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    valid = (torch.arange(30) >= 7)[None]
    padded = pagerank(q, k, 0.3, mask=valid, voters=valid, causal=True)
    alone = pagerank(q[:, :, 7:], k[:, :, 7:], 0.3, causal=True)
    assert torch.allclose(padded[:, 7:], alone, atol=1e-6)
    assert bool((padded[:, :7] == 0).all())
    assert bool(pagerank(q, k, 0.3, mask=valid, causal=True).isfinite().all())  # rows that see nothing


def test_rows_that_received_nothing_still_vote() -> None:
    """The released code counts removed rows among the N that start with 1 / N; without their votes scores differ."""
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    alive = (torch.arange(40) % 3 != 1)[None]
    masked, hard = pagerank(q, k, 0.3, mask=alive, causal=True), pagerank(q, k, 0.3, mask=alive, voters=alive)
    assert not torch.allclose(masked, hard, atol=1e-3)
    assert bool((masked[~alive] == 0).all())


def test_a_long_prompt_fits_into_memory(peak_memory: Any) -> None:
    """[H, N, N] would take 3.6 GB; what is streamed is a block of it."""
    setup = "from vtc.ops.pagerank import pagerank; q = torch.randn(1, 4, 15000, 8); k = torch.randn(1, 2, 15000, 8)"
    assert peak_memory(setup, "pagerank(q, k, 0.3, causal=True, iterations=2)") < 2**30


def test_sharpening_underflows_to_zero() -> None:
    """Scores of exactly 0 are common; they are finite and tie."""
    q = torch.randn(1, 2, 64, 16) * 6
    score = pagerank(q, torch.randn(1, 2, 64, 16) * 6, 0.25, causal=True)
    assert int((score == 0).sum()) > 1
    assert math.isfinite(float(score.sum()))
