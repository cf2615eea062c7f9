"""LongVLM's merging against its steps, one clip, one pair and one mean at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.method.parts import clips, share
from vtc.ops.merge import merge_plan
from vtc.testing import TINY_MODELS
from vtc.testing.plain import merge as plain

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
CLIPS = [(9, 2, 3), (1, 2, 3), (4, 3, 3), (5, 1, 2)]


def scene(make_view: Any, shapes: Any, width: int = 12, **budget: Any) -> Any:
    """A view with features."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    features = [torch.randn(n, width, generator=generator) for n in counts]
    return make_view(shapes, vision={(22, Rows.HIDDEN): features}, spec=CLIP_L, **budget)


def plain_clips(layout: Any, count: int, number: int) -> list[list[int]]:
    """The tokens of each clip."""
    if layout.kind == "image":
        return [list(range(count))]
    size, found = count // layout.n_crops, []
    step = (layout.n_crops + number - 1) // number * size
    for first in range(0, count, step):
        found.append(list(range(first, min(count, first + step))))
    return found


@pytest.mark.parametrize("options", [{"clips": 3, "heads": 4}, {"clips": 2, "heads": 1}, {"heads": 3}], ids=str)
@pytest.mark.parametrize("budget", [{"keep": 2}, {"keep": 11}, {"retention": 0.4}, {"retention": 0.8}], ids=str)
def test_the_plain_steps(make_view: Any, video: Any, shape: Any, kept: Any, budget: Any, options: Any) -> None:
    shapes = [video(*each) for each in CLIPS] + [(4, 5), shape(((1, 3, 3), (2, 2, 2)), newlines=True)]
    view = scene(make_view, shapes, **budget)
    method: Any = vtc.create("longvlm", **options)
    selection = method.select(view)
    kept(view, selection)
    for item, count in enumerate(view.items.counts):
        groups = plain_clips(view.items.layouts[item], count, method.clips)
        keep = view.keep[item]
        if keep < len(groups):
            groups = [list(range(count))]
        features = view.vision_attention(22, Rows.HIDDEN)[item]
        width = features.shape[1] // method.heads
        metric = sum(features[:, h * width : (h + 1) * width] for h in range(method.heads)) / method.heads
        expected: dict[int, Any] = {}
        for members, few in zip(groups, share(keep, [len(members) for members in groups]), strict=True):
            size = torch.ones(1, len(members))
            plan = merge_plan(len(members), few)
            found = plain.bipartite_merge(metric[members][None], [len(members)], [plan], size=size)
            for row in range(found.counts[0]):
                into = [members[j] for j in range(len(members)) if found.target[0, j] == row]
                expected[members[int(found.anchor[0, row])]] = into
        assert selection.keep[item].nonzero().flatten().tolist() == sorted(expected)
        for place, into in expected.items():
            mean = view.tokens[item, into].double().mean(0)
            assert torch.allclose(selection.tokens[item, place].double(), mean, atol=5e-5)
            assert selection.merged_into[item, into].tolist() == [place] * len(into)


def test_published_counts(make_view: Any, video: Any) -> None:
    """A hundred frames of 256 tokens become ten clips of 30; 101 frames are nine clips of eleven and one of two."""
    assert merge_plan(2560, 30) == [1280, 640, 320, 160, 80, 40, 10]
    assert merge_plan(5760, 50) == [2880, 1440, 720, 360, 180, 90, 40]
    for frames, sizes in ((100, [10] * 10), (101, [11] * 9 + [2]), (7, [1] * 7)):
        crop, found = clips(make_view([video(frames, 1, 2), (3, 3)], keep=5), 10)
        assert found == [[2 * size for size in sizes], [9]]
        assert crop[0, : 2 * frames].bincount().tolist() == found[0]
        assert not crop[1, :9].any()


def test_videos_that_lost_tokens_are_cut_the_same_way(make_view: Any, video: Any) -> None:
    view = make_view([video(5, 1, 2), (2, 2)], keep=3)
    left = view.items.mask & (view.items.token != 3) & (view.items.token != 9)
    moved = torch.arange(view.visual.shape[1]).expand_as(view.visual)
    items = view.items.kept(left, left.sum(1).tolist(), moved)
    crop, sizes = clips(dataclasses.replace(view, items=items), 3)
    assert [each for each in sizes[0] if each] == [3, 4, 1] and crop[0, :8].tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert [each for each in sizes[1] if each] == [3]


def test_plans_and_refusals(make_view: Any) -> None:
    assert dataclasses.asdict(vtc.create("longvlm")) == {"clips": 10, "heads": 16}
    for spec, layer in ((CLIP_L, 22), (QWEN, 31)):
        plan = vtc.create("longvlm").plan(spec)
        assert plan.needs == Needs({layer: Rows.HIDDEN})
        assert (plan.stages, plan.positions) == ((0,), "preserve" if spec.mrope else "compact")
    for name, code in (("clips", 10), ("heads", 16)):
        with pytest.raises(VTCError, match=f"{name}=0 has to be at least 1; the code has {code}"):
            vtc.create("longvlm", **{name: 0})
    with pytest.raises(UnsupportedMethod, match="the 12 features of this llava model's encoder do not split into 16"):
        vtc.create("longvlm").select(scene(make_view, [(4, 4)], keep=3))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met(name: str, meets_budget: Callable[[str, str, float], None]) -> None:
    meets_budget(name, "longvlm", 0.4)
