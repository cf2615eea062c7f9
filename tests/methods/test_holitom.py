"""HoliTom against its rules, one window, one frame and one token at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.method.two_stages import schedule
from vtc.testing import TINY_MODELS
from vtc.testing.plain.density import plain_density_peaks
from vtc.testing.plain.frames import plain_partition

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 28)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
CLIPS = [(9, 3, 5), (1, 2, 3), (6, 3, 3), (2, 5, 5)]
OPTIONS: list[dict[str, Any]] = [{}, {"threshold": 0.5, "own": 0.3}, {"threshold": -1.0}]


def scene(make_view: Any, shapes: Any, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    """A view of clips of which some places move; attention has ties."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    attention = [torch.randn(n, generator=generator).exp().mul(9).round().div(1000) for n in counts]
    view = make_view(shapes, vision={spec.key_layer: attention}, spec=spec, width=8, **budget)
    hidden = view.hidden.clone()
    for item, layout in enumerate(view.items.layouts):
        size = view.items.counts[item] // layout.n_crops
        for frame in range(1, layout.n_crops if layout.kind == "video" else 0):
            place = view.items.index[item, (frame - 1) * size : (frame + 1) * size].view(2, size)
            noise = torch.randn(size, 8, generator=generator) * torch.rand(size, 1, generator=generator) ** 2
            hidden[view.items.row[item], place[1]] = hidden[view.items.row[item], place[0]] + 2 * noise
    return dataclasses.replace(view, states=type(view.states)(hidden))


def plain_rows(
    x: Tensor, a: list[float], size: int, keep: int, shares: Any, method: Any
) -> tuple[dict[int, Tensor], list[int]]:
    """The rows by their places, and where every token went; frames of `size` tokens each."""
    x, count = x.double(), len(x)
    like = {j: float(torch.cosine_similarity(x[j], x[j - size], dim=0)) for j in range(size, count)}
    same = [[like.get(f * size + p, -2) > method.threshold for p in range(size)] for f in range(count // size)]
    root, joins = list(range(count)), []
    still: dict[int, list[int]] = {}
    for window in plain_partition(same):
        fixed = [p for p in range(size) if len(window) > 1 and all(same[f][p] for f in window[1:])]
        still[window[0]] = [window[0] * size + p for p in fixed]
        for frame in window[1:]:
            for place in fixed:
                joins.append((frame * size + place, window[0] * size + place))
    for token, first in sorted(joins, key=lambda pair: (-round(like[pair[0]], 6), pair[0]))[: count - keep]:
        root[token] = first
    for first in set(root):
        x[first] = x[[j for j in range(count) if root[j] == first]].mean(0)  # roots join nobody
    here = set(root)
    sets = [still.get(f, []) for f in range(count // size)]
    others = [[j for j in range(f * size, (f + 1) * size) if j in here and j not in sets[f]] for f in range(len(sets))]
    quota = shares(keep, [len(each) for each in [*sets, *others]])
    rows: dict[int, Tensor] = {}
    home: dict[int, int] = {}
    for members, few in zip(others, quota[len(sets) :], strict=True):
        for j in sorted(members, key=lambda j: (-a[j], j))[:few]:
            rows[j], home[j] = x[j], j
    for members, few in zip(sets, quota[: len(sets)], strict=True):
        if not few:
            continue
        every = torch.ones(1, len(members), dtype=torch.bool)
        goes = plain_density_peaks(x[members][None], torch.tensor([few]), every, near=7, capped=True)[0].tolist()
        home |= {j: members[centre] for j, centre in zip(members, goes, strict=True)}
        for centre in set(goes):
            mean = x[[j for j, each in zip(members, goes, strict=True) if each == centre]].mean(0)
            rows[members[centre]] = method.own * x[members[centre]] + (1 - method.own) * mean
    return rows, [home.get(root[j], -1) for j in range(count)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 12}, {"keep": 25}, {"retention": 0.7}], ids=str)
def test_the_plain_rows(
    make_view: Any, video: Any, shape: Any, kept: Any, shares: Any, budget: Any, options: Any
) -> None:
    shapes = [video(*each) for each in CLIPS] + [(7, 5), shape(((1, 3, 3), (2, 2, 2)), newlines=budget != {"keep": 1})]
    view = scene(make_view, shapes, **budget)
    method: Any = vtc.create("holitom", **options)
    selection = method.select(view)
    counts = [first for first, _ in schedule(view, 18, 0.5)]
    found = kept(view, selection)
    for item, count in enumerate(view.items.counts):
        layout = view.items.layouts[item]
        size = count // layout.n_crops if layout.kind == "video" else count
        a = view.vision_attention(22)[item, :count].tolist()
        rows, into = plain_rows(view.tokens[item, :count], a, size, counts[item], shares, method)
        assert selection.keep[item].nonzero().flatten().tolist() == sorted(rows)
        assert len(rows) == len(found[item]) == counts[item]
        for place, row in rows.items():
            assert torch.allclose(selection.tokens[item, place].double(), row, atol=5e-5)
        assert selection.merged_into[item, :count].tolist() == into


def test_each_stage_leaves_what_the_budget_says(make_view: Any, video: Any) -> None:
    """The published share of 15 % before the LLM is a mean of 12.3 %."""
    view = scene(make_view, [video(4, 14, 14)], keep=int(0.15 * 784 * 23 / 28))
    assert schedule(view, 18, 0.5) == [(117, 58)]
    whole = vtc.create("holitom", later=1.0).select(view)
    assert whole.counts == (96,)


def test_the_stage_inside(make_view: Any, video: Any) -> None:
    """Every dropped token halves into the most similar one kept, in the order of their places."""
    method = vtc.create("holitom")
    view = scene(make_view, [video(3, 4, 4), (3, 5)], keep=10)
    rows = torch.rand(view.visual.shape, generator=torch.Generator().manual_seed(4))
    memory = {(method, "later"): (6, 4)}
    view = dataclasses.replace(view, stage=18, llm_rows={(17, Rows.LAST): rows}, memory=memory)
    selection = method.select(view)
    for item, (count, few) in enumerate(zip(view.items.counts, (6, 4), strict=True)):
        score = view.llm_attention(17, Rows.LAST)[item].tolist()
        best = sorted(sorted(range(count), key=lambda j: (-score[j], j))[:few])
        x = view.tokens[item].double()
        held, into = x.clone(), list(range(count))
        for j in (j for j in range(count) if j not in best):
            into[j] = max(best, key=lambda i: (float(torch.cosine_similarity(x[i], x[j], dim=0)), -i))
            held[into[j]] = (held[into[j]] + x[j]) / 2
        assert selection.keep[item, :count].nonzero().flatten().tolist() == best
        assert selection.merged_into[item, :count].tolist() == into
        assert torch.allclose(selection.tokens[item, best].double(), held[best], atol=1e-5)


def test_encoders_without_a_class_token(make_view: Any, kept: Any) -> None:
    """A picture is ranked by attention."""
    view = scene(make_view, [(4, 5)], QWEN, keep=9)
    (found,) = kept(view, vtc.create("holitom", later=1.0).select(view))
    a = view.vision_attention(31, Rows.RECEIVED)[0].tolist()
    assert found == sorted(sorted(range(20), key=lambda j: (-a[j], j))[:9])


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("holitom")) == {"threshold": 0.8, "own": 0.6, "later": 0.5}
    for spec, layer, reading, inner in ((CLIP_L, 22, Rows.CLS, 18), (QWEN, 31, Rows.RECEIVED, 23)):
        plan = vtc.create("holitom").plan(spec)
        assert plan.needs == Needs({layer: reading}, {inner - 1: Rows.LAST})
        assert (plan.stages, plan.positions) == ((0, inner), "preserve" if spec.mrope else "compact_input")
    assert vtc.create("holitom", later=1.0).plan(CLIP_L).needs == Needs({22: Rows.CLS})
    refused = {
        "threshold": (1.5, r"threshold=1.5 is no cosine; pass a number in \[-1, 1\], the paper uses 0.8"),
        "own": (-0.1, "own=-0.1 is no share of 1; the paper uses 0.6"),
        "later": (0.0, "later=0.0 is no share of tokens above 0; the paper uses 0.5"),
    }
    for name, (value, words) in refused.items():
        with pytest.raises(VTCError, match=words):
            vtc.create("holitom", **{name: value})
    with pytest.raises(UnsupportedMethod, match="has one layer; nothing can be dropped inside"):
        vtc.create("holitom").plan(dataclasses.replace(CLIP_L, llm_layers=1))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str, nears_budget: Any) -> None:
    def rounding(layers: int, items: int) -> float:
        return (layers - max(1, 18 * layers // 28)) / layers / 2 * items + 1e-9

    nears_budget(name, "holitom", (0.3, 0.7, 1.0), rounding)
