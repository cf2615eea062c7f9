"""PiToMe against its steps, one token and one mean at a time; the encoders of tests/test_encoders.py run it whole."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import PRE_LLM, EncoderStage, ModelSpec
from vtc.methods.pitome import KEYS, PiToMe, energy, energy_step
from vtc.ops.merge import bipartite_merge
from vtc.testing import tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, encoder_stages=True, single_crop=True)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)


def test_defaults_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("pitome")) == {
        "inside": False, "ratio": None, "metric": "keys", "weighted": True, "proportional": True, "scope": "crop",
    }  # fmt: skip
    for options, message in (
        ({"ratio": 0.9}, "ratio=0.9 is a share per encoder block; pass inside=True"),
        ({"ratio": 0.4, "inside": True}, r"ratio=0.4 lies outside \[0.5, 1\]"),
        ({"metric": "key"}, "unknown metric 'key'; did you mean 'keys'"),
    ):
        with pytest.raises(VTCError, match=message):
            vtc.create("pitome", **options)
    assert PiToMe().plan(CLIP_L) == vtc.Plan((PRE_LLM,), vtc.Needs({22: KEYS}), "compact")
    plan = PiToMe(inside=True).plan(CLIP_L)
    assert plan.stages == tuple(EncoderStage(layer) for layer in range(1, 24))
    assert plan.needs == vtc.Needs(dict.fromkeys(range(23), KEYS))
    assert PiToMe(inside=True, metric="features").plan(CLIP_L).needs == vtc.Needs()
    with pytest.raises(
        UnsupportedMethod,
        match="inside=True works on the patches inside the vision encoder, which this qwen2_5_vl model does",
    ):
        PiToMe(inside=True).plan(QWEN)


def test_a_ratio_is_the_share_of_every_block() -> None:
    tokens, left = 196, []
    for plan in PiToMe(inside=True, ratio=0.95).steps(12, 196, None):
        assert sum(plan) == math.floor(tokens - tokens * 0.95)
        tokens -= sum(plan)
        left.append(tokens)
    assert (left[0], left[-1]) == (187, 110)


@given(st.integers(1, 30), st.integers(1, 800), st.data())
def test_a_budget_is_met_to_the_token(blocks: int, tokens: int, data: Any) -> None:
    keep = data.draw(st.integers(1, tokens))
    left = tokens
    for number, plan in enumerate(PiToMe(inside=True).steps(blocks, tokens, keep)):
        for gone in plan:
            assert 0 <= gone <= left // 2
            left -= gone
        share = (keep / tokens) ** (1 / blocks)
        if share > 0.55 and tokens > 50:
            assert abs(left - tokens * share ** (number + 1)) <= 1
    assert left == keep


# --- one pass
def slow(
    metric: Tensor, gone: int, margin: float, size: list[float] | None
) -> tuple[list[list[int]], list[list[float]]]:
    """For every row left, in order, the tokens in it and their shares: equations of the paper, one token at a time."""

    def cosine(a: int, b: int) -> float:
        x, y = metric[a].double(), metric[b].double()
        return float(x @ y / (x.norm() * y.norm()))

    def elu(x: float) -> float:
        return x if x >= 0 else math.exp(x) - 1

    number = range(len(metric))
    energies = [sum(elu(cosine(i, j) - margin) for j in number) / len(metric) for i in number]
    ranks = sorted(number, key=lambda i: (-round(energies[i], 9), i))  # of two tokens both have the same
    mergeable = ranks[: 2 * gone]
    sources, targets = mergeable[0::2], mergeable[1::2]
    rows = {i: [i] for i in number if i not in sources}
    for i in sources:
        best = targets[0]
        for j in targets:
            if cosine(i, j) > cosine(i, best):
                best = j
        rows[best].append(i)
    weights = [1.0] * len(metric) if size is None else size
    shares = [[weights[i] / sum(weights[j] for j in row) for i in row] for row in rows.values()]
    return list(rows.values()), shares


@pytest.mark.parametrize("counts", [(2, 1, 3), (9, 9, 9), (63, 40, 12), (80, 1, 5)])
@pytest.mark.parametrize("weighted", [True, False])
def test_one_pass_is_the_slow_one(counts: tuple[int, ...], weighted: bool) -> None:
    """Groups of different size side by side; what stands behind their ends is large."""
    generator = torch.Generator().manual_seed(sum(counts))
    metric = torch.randn(3, max(counts), 8, generator=generator)
    size = torch.randint(1, 6, metric.shape[:2], generator=generator).float()
    for group, count in enumerate(counts):
        metric[group, count:] = 1e4
    for share in (0.5, 0.34, 0.1):
        merged = [int(count * share) for count in counts]
        step = functools.partial(energy_step, margin=0.45)
        found = bipartite_merge(metric, counts, [[r] for r in merged], size=size if weighted else None, step=step)
        assert found.counts == tuple(n - r for n, r in zip(counts, merged, strict=True))
        for group, (count, r) in enumerate(zip(counts, merged, strict=True)):
            given = size[group].tolist() if weighted else None
            rows, shares = slow(metric[group, :count], r, 0.45, given)
            assert found.anchor[group, : count - r].tolist() == [row[0] for row in rows]
            for place, (row, weights) in enumerate(zip(rows, shares, strict=True)):
                assert sorted(row) == (found.target[group] == place).nonzero().flatten().tolist()
                assert found.weight[group, row].tolist() == pytest.approx(weights, abs=1e-6)


def test_isolated_tokens_have_less_energy_and_stay() -> None:
    """Ten copies of one direction and three directions of their own: only copies merge."""
    axes = torch.eye(8)
    metric = torch.cat([axes[:1].expand(10, -1), axes[1:4]])[None]
    found = energy(metric, torch.tensor([13]), 0.5)[0]
    assert float(found[:10].min()) > float(found[10:].max())
    target, anchor = energy_step(metric, [13], [5], margin=0.5)
    assert anchor[0].tolist() == [1, 3, 5, 7, 9, 10, 11, 12]
    assert target[0, 10:].tolist() == [5, 6, 7]


@pytest.mark.parametrize("metric", ["keys", "features"])
def test_before_the_llm_crops_merge_by_halves(make_view: Any, kept: Any, metric: Any) -> None:
    keys = [torch.randn(63, 8, generator=torch.Generator().manual_seed(1))]
    view = make_view([(7, 9)], vision={(22, KEYS): keys}, keep=20)
    selection = PiToMe(metric=metric).select(view)
    values, rows, parts = (keys[0] if metric == "keys" else view.tokens[0]), view.tokens[0], [[n] for n in range(63)]
    anchors = list(range(63))
    for gone in (31, 12):
        groups, shares = slow(values, gone, 0.9 - 0.9 * 22 / 23, [float(len(part)) for part in parts])
        pairs = list(zip(groups, shares, strict=True))
        rows, values = (
            torch.stack([sum(w * old[n] for n, w in zip(group, share, strict=True)) for group, share in pairs])
            for old in (rows, values)
        )
        parts = [[each for n in group for each in parts[n]] for group in groups]
        anchors = [anchors[group[0]] for group in groups]
    assert kept(view, selection)[0] == anchors
    assert torch.allclose(selection.tokens[0, anchors], rows, atol=1e-5)


@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip", "llava-dinov2"])
def test_inside_it_runs_in_front_of_an_llm(name: str) -> None:
    model, inputs = tiny_model(name), tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]])
    with torch.no_grad(), vtc.compress(model, "pitome", inside=True, retention=0.5) as handle:
        together = model(**inputs).logits[:, -1]
    call = handle.stats.calls[0]
    assert call.visual_tokens_in == (32, 16) and call.visual_tokens_kept == (16.0, 8.0)
    alone = tiny_inputs(name, [[4, "image", 3, "image", 5], [2, "image", 12]], only=1)
    with torch.no_grad(), vtc.compress(model, "pitome", inside=True, retention=0.5):
        assert float((model(**alone).logits[0, -1] - together[1]).abs().max()) <= 5e-5


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(3))
    counts, merged = [33, 20], [9, 4]
    whole = energy_step(metric, counts, merged, margin=0.4)
    monkeypatch.setattr("vtc.methods.pitome.BLOCK", 5 * 2 * 33)  # five rows at once
    few = energy_step(metric, counts, merged, margin=0.4)
    assert all(torch.equal(*pair) for pair in zip(whole, few, strict=True))
