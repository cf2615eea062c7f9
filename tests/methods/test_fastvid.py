"""FastVID against its rules, one segment, one frame and one token at a time."""

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
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.methods import fastvid
from vtc.testing import TINY_MODELS
from vtc.testing.plain.density import plain_peaks
from vtc.testing.plain.frames import plain_cuts, plain_shares

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
CLIPS = [(9, 3, 5), (1, 2, 3), (6, 3, 3), (2, 8, 8)]


def plain_quota(left: list[int], room: list[int], segment: list[int], step: int) -> dict[int, int]:
    first = [f for f in segment if (segment[-1] - f) % step == 0]
    total = sum(left[f] for f in segment)
    quota = dict.fromkeys(segment, 0)
    for some in (first, [f for f in segment if f not in first]):
        spend = min(total, sum(room[f] for f in some))
        for frame, count in zip(some, plain_shares([1.0] * len(some), spend, [room[f] for f in some]), strict=True):
            quota[frame] = count
        total -= spend
    return quota


def plain_rows(
    x: Tensor, a: list[float], frames: list[list[int]], shares: list[int], method: Any
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """The rows by their places, and the most similar anchor of every token that joined one."""
    x = x.double()
    left = [int(share * method.context + 1e-9) for share in shares]
    attended, free = [], []
    for members, share, less in zip(frames, shares, left, strict=True):
        ranked = sorted(members, key=lambda j: (-a[j], j))
        attended.append(ranked[: share - less])
        free.append([j for j in members if j not in attended[-1]])
    room = [len(each) for each in free]
    rows = {j: x[j] for each in attended for j in each}
    into: dict[int, int] = {}
    means = torch.stack([x[members].mean(0) for members in frames])
    for segment in plain_cuts(means, method.segments, method.threshold):
        quota = plain_quota(left, room, segment, method.step)
        like: dict[int, tuple[float, int]] = {}
        for frame in segment:
            if not quota[frame]:
                continue
            spots, near = free[frame], torch.tensor([min(4, room[frame])])
            every = torch.ones(1, len(spots), dtype=torch.bool)
            marks = plain_peaks(x[spots][None], torch.tensor([quota[frame]]), near, every, 0, 0)[0].tolist()
            anchors = [j for j, mark in zip(spots, marks, strict=True) if mark]
            joined: dict[int, list[int]] = {anchor: [] for anchor in anchors}
            for j in (j for f in segment for j in free[f]):
                cosine = {i: round(float(torch.cosine_similarity(x[i], x[j], dim=0)), 9) for i in anchors}
                best = max(anchors, key=lambda i: (cosine[i], -i))
                joined[best].append(j)
                if j not in like or cosine[best] > like[j][0]:
                    like[j] = cosine[best], best
            for anchor, some in joined.items():
                weight = max(method.own, 1 / (len(some) + 1))
                rows[anchor] = weight * x[anchor] + (1 - weight) * x[some].mean(0)
        into |= {j: anchor for j, (_, anchor) in like.items()}
    return rows, into


def scene(make_view: Any, shapes: Any, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    """A view of clips that move slowly but for a few frames; attention has ties."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    attention = [torch.randn(n, generator=generator).exp().mul(9).round().div(1000) for n in counts]
    view = make_view(shapes, vision={spec.key_layer: attention}, spec=spec, width=8, **budget)
    hidden = view.hidden.clone()
    for item, layout in enumerate(view.items.layouts):
        size = view.items.counts[item] // layout.n_crops
        for frame in range(layout.n_crops if layout.kind == "video" else 0):
            place = view.items.index[item, frame * size : (frame + 1) * size]
            hidden[view.items.row[item], place] += 4 * torch.randn(8, generator=generator) * (frame % 3 == 1) + 1
    return dataclasses.replace(view, states=type(view.states)(hidden))


def frames_of(view: Any, item: int) -> list[list[int]]:
    layout, count = view.items.layouts[item], view.items.counts[item]
    size = count // layout.n_crops if layout.kind == "video" else count
    return [list(range(first, first + size)) for first in range(0, count, size)]


OPTIONS: list[dict[str, Any]] = [{}, {"segments": 2, "threshold": 0.5}, {"segments": 1, "context": 0.8, "step": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 12}, {"keep": 44}, {"retention": 0.8}], ids=str)
def test_the_plain_rows(make_view: Any, video: Any, kept: Any, shares: Any, budget: Any, options: Any) -> None:
    view = scene(make_view, [video(*each) for each in CLIPS] + [(7, 5)], **budget)
    method = vtc.create("fastvid", **options)
    selection = method.select(view)
    kept(view, selection)
    for item, count in enumerate(view.items.counts):
        frames = frames_of(view, item)
        a = view.vision_attention(22)[item, :count].tolist()
        each = shares(view.keep[item], [len(members) for members in frames])
        rows, into = plain_rows(view.tokens[item, :count], a, frames, each, method)
        assert selection.keep[item].nonzero().flatten().tolist() == sorted(rows)
        assert len(rows) == view.keep[item]
        for place, row in rows.items():
            assert torch.allclose(selection.tokens[item, place].double(), row, atol=5e-5)
        expected = [j if j in rows else into.get(j, -1) for j in range(count)]
        assert selection.merged_into[item, :count].tolist() == expected


def test_encoders_without_a_class_token(make_view: Any, video: Any, kept: Any) -> None:
    """With no context it is a ranking by attention in every frame."""
    view = scene(make_view, [video(3, 4, 4)], QWEN, keep=9)
    (found,) = kept(view, vtc.create("fastvid", context=0.0).select(view))
    a = view.vision_attention(31, Rows.RECEIVED)[0].tolist()
    best = [sorted(members, key=lambda j: (-a[j], j))[:3] for members in frames_of(view, 0)]
    assert found == sorted(j for each in best for j in each)


def test_blocks_change_nothing(make_view: Any, video: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = scene(make_view, [video(5, 4, 4), video(2, 3, 3)], retention=0.5)
    whole = vtc.create("fastvid").select(view)
    monkeypatch.setattr(fastvid, "BLOCK", 800)
    parts = vtc.create("fastvid").select(view)
    assert torch.equal(parts.keep, whole.keep) and torch.equal(parts.merged_into, whole.merged_into)
    assert torch.allclose(parts.tokens, whole.tokens, atol=1e-6)


def test_no_frame_has_more_anchors_than_said() -> None:
    """The host's bound, for every length of a segment."""
    method = vtc.create("fastvid")
    for frames in range(1, 14):
        for keep in range(1, 20 * frames + 1, 7):
            share = [keep // frames + (f < keep % frames) for f in range(frames)]
            left = [int(each * method.context + 1e-9) for each in share]
            room = [20 - each + less for each, less in zip(share, left, strict=True)]
            for end in range(1, frames + 1):
                quota = plain_quota(left, room, list(range(frames - end, frames)), method.step)
                assert max(quota.values()) <= method._most(keep, frames)


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("fastvid")) == {
        "segments": 8, "threshold": 0.9, "context": 0.4, "step": 4, "own": 0.6,
    }  # fmt: skip
    for spec, layer, reading in ((CLIP_L, 22, Rows.CLS), (QWEN, 31, Rows.RECEIVED)):
        plan = vtc.create("fastvid").plan(spec)
        assert plan.needs == Needs(vision={layer: reading})
        assert (plan.stages, plan.positions) == ((0,), "preserve")
    for name in ("segments", "step"):
        with pytest.raises(VTCError, match=f"{name}=0 has to be at least 1; the paper uses"):
            vtc.create("fastvid", **{name: 0})
    for name in ("context", "own"):
        with pytest.raises(VTCError, match=f"{name}=1.5 is no share of 1; the paper uses 0"):
            vtc.create("fastvid", **{name: 1.5})
    assert math.isclose(vtc.create("fastvid").own, 0.6)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "fastvid", 0.4)
