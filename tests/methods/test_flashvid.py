"""FlashVID against its rules: matrices of distances, trees link by link, clusters frame by frame."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.method.two_stages import schedule
from vtc.ops import similarity
from vtc.testing import TINY_MODELS
from vtc.testing.plain.density import plain_density_peaks
from vtc.testing.plain.frames import plain_cuts, plain_shares

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 28)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
CLIPS = [(9, 3, 5), (1, 2, 3), (6, 3, 3), (2, 5, 5)]
OPTIONS: list[dict[str, Any]] = [
    {"segments": 3}, {"segments": 1, "threshold": 0.0, "diverse": 0.4}, {"segments": 1, "diverse": 0.0},
    {"segments": 2, "threshold": 0.2, "similarity": -1.0}, {"diverse": 1.0},
]  # fmt: skip


def scene(make_view: Any, shapes: Any, spec: ModelSpec = CLIP_L, **budget: Any) -> Any:
    """A view of clips that move slowly; attention has ties."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    attention = [torch.rand(n, generator=generator).mul(9).round().div(100) for n in counts]
    view = make_view(shapes, vision={spec.key_layer: attention}, spec=spec, width=8, **budget)
    hidden = view.hidden.clone()
    for item, layout in enumerate(view.items.layouts):
        size = view.items.counts[item] // layout.n_crops
        for frame in range(1, layout.n_crops if layout.kind == "video" else 0):
            place = view.items.index[item, (frame - 1) * size : (frame + 1) * size].view(2, size)
            noise = torch.randn(size, 8, generator=generator) * torch.rand(size, 1, generator=generator) ** 2
            hidden[view.items.row[item], place[1]] = hidden[view.items.row[item], place[0]] + noise
    return dataclasses.replace(view, states=type(view.states)(hidden))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


def plain_diverse(x: Tensor, w: list[float], count: int) -> list[int]:
    """DivPrune's walk on the matrix of distances whose columns are scaled."""
    d = [[(1 - cosine(a, b)) * w[j] if i != j else 0.0 for j, b in enumerate(x)] for i, a in enumerate(x)]
    found: list[int] = []
    while len(found) < count:
        if not found:
            rated = [sorted(row[j] for row in d)[1] if len(d) > 1 else 0.0 for j in range(len(d))]
        else:
            rated = [min(d[i][j] for i in found) if j not in found else -1.0 for j in range(len(d))]
        found.append(max(range(len(d)), key=lambda j: (round(rated[j], 7), -j)))
    return found


def plain_trees(x: Tensor, free: list[list[int]], budget: int, similarity: float) -> dict[int, int]:
    """The root of every free token of a segment; free: of each of its frames."""
    links: dict[int, tuple[float, int]] = {}
    for before, members in itertools.pairwise(free):
        for j in members if before else []:
            best = max(before, key=lambda i: (round(cosine(x[i], x[j]), 9), -i))
            if cosine(x[best], x[j]) > similarity:
                links[j] = cosine(x[best], x[j]), best
    fit = sum(map(len, free)) - budget
    made = sorted(links, key=lambda j: (-round(links[j][0], 6), j))[:fit]
    root: dict[int, int] = {}
    for j in (j for members in free for j in members):
        root[j] = root[links[j][1]] if j in made else j
    return root


def plain_rows(
    x: Tensor, a: list[float], frames: list[list[int]], shares: list[int], method: Any
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """The rows by their places, and where every token went that went anywhere."""
    x = x.double()
    first = [math.ceil(method.diverse * b - 1e-9) for b in shares]
    means = torch.stack([x[members].mean(0) for members in frames])
    rows: dict[int, Tensor] = {}
    home: dict[int, int] = {}
    for segment in plain_cuts(means, method.segments, method.threshold):
        free = []
        for f in segment:
            relevance = {j: sum(float(x[j] @ means[g]) for g in segment) / len(segment) for j in frames[f]}
            w = [max(0.0, relevance[j]) * a[j] for j in frames[f]]
            kept = [frames[f][j] for j in plain_diverse(x[frames[f]], w, first[f])]
            rows |= {j: x[j] for j in kept}
            home |= {j: j for j in kept}
            free.append([j for j in frames[f] if j not in kept])
        budget = sum(shares[f] - first[f] for f in segment)
        root = plain_trees(x, free, budget, method.similarity)
        mean = {r: x[[j for j in root if root[j] == r]].mean(0) for r in root.values()}
        ends = [[j for j in members if root[j] == j] for members in free]
        sizes = list(map(len, ends))
        at: dict[int, int] = {}
        for members, few in zip(ends, plain_shares([float(n) for n in sizes], budget, sizes, 1), strict=True):
            if not few:
                continue
            given = torch.stack([mean[j] for j in members])
            every = torch.ones(1, len(members), dtype=torch.bool)
            goes = plain_density_peaks(given[None], torch.tensor([few]), every, near=7)[0].tolist()
            at |= {j: members[centre] for j, centre in zip(members, goes, strict=True)}
            for centre in set(goes):
                rows[members[centre]] = given[[each == centre for each in goes]].mean(0)
        home |= {j: at[r] for j, r in root.items() if r in at}
    return rows, home


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 12}, {"keep": 25}, {"retention": 0.7}], ids=str)
def test_the_plain_rows(
    make_view: Any, video: Any, shape: Any, kept: Any, shares: Any, budget: Any, options: Any
) -> None:
    tiled = shape(((1, 3, 3), (2, 2, 2)), newlines=budget != {"keep": 1})
    view = scene(make_view, [video(*each) for each in CLIPS] + [(7, 5), tiled], **budget)
    method: Any = vtc.create("flashvid", **options)
    selection = method.select(view)
    counts = [first for first, _ in schedule(view, 20, 0.3)]
    kept(view, selection)
    for item, count in enumerate(view.items.counts):
        layout = view.items.layouts[item]
        size = count // layout.n_crops if layout.kind == "video" else count
        frames = [list(range(first, first + size)) for first in range(0, count, size)]
        a = view.vision_attention(22)[item, :count].tolist()
        each = shares(counts[item], [size] * len(frames))
        rows, home = plain_rows(view.tokens[item, :count], a, frames, each, method)
        assert selection.keep[item].nonzero().flatten().tolist() == sorted(rows)
        assert len(rows) == counts[item]
        for place, row in rows.items():
            assert torch.allclose(selection.tokens[item, place].double(), row, atol=5e-5)
        assert selection.merged_into[item, :count].tolist() == [home.get(j, -1) for j in range(count)]


def test_the_walk_without_stored_similarities(make_view: Any, video: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few items at a time, and row by row."""
    view = scene(make_view, [video(4, 4, 4), (3, 5)], retention=0.5)
    whole = vtc.create("flashvid").select(view)
    for store in (600, 10):
        monkeypatch.setattr(similarity, "STORE", store)
        assert torch.equal(vtc.create("flashvid").select(view).keep, whole.keep)


def test_published_counts(make_view: Any, video: Any) -> None:
    """A quarter more than the retention before the LLM, and 0.3 of that behind its layer 20."""
    view = scene(make_view, [video(4, 10, 10)], keep=40)
    assert schedule(view, 20, 0.3) == [(50, 15)]
    method = vtc.create("flashvid")
    assert method.select(view).counts == (50,)
    rows = torch.rand(view.visual.shape, generator=torch.Generator().manual_seed(4))
    later = dataclasses.replace(view, stage=20, llm_rows={(19, Rows.LAST): rows})
    score = later.llm_attention(19, Rows.LAST)[0].tolist()
    found = method.select(later).keep[0].nonzero().flatten().tolist()
    assert found == sorted(sorted(range(400), key=lambda j: (-score[j], j))[:15])


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(vtc.create("flashvid")) == {
        "segments": 8, "threshold": 0.9, "diverse": 0.7, "similarity": 0.8, "later": 0.3,
    }  # fmt: skip
    for spec, layer, reading, inner in ((CLIP_L, 22, Rows.CLS, 20), (QWEN, 31, Rows.RECEIVED, 25)):
        plan = vtc.create("flashvid").plan(spec)
        assert plan.needs == Needs({layer: reading}, {inner - 1: Rows.LAST})
        assert (plan.stages, plan.positions) == ((0, inner), "preserve" if spec.mrope else "compact_input")
    assert vtc.create("flashvid", later=1.0).plan(CLIP_L).stages == (0,)
    refused = {
        "segments": (0, "segments=0 has to be at least 1; the code has 8"),
        "diverse": (1.5, "diverse=1.5 is no share of 1; the code has 0.7"),
        "similarity": (-2.0, r"similarity=-2.0 is no cosine; pass a number in \[-1, 1\], the code has 0.8"),
        "later": (0.0, "later=0.0 is no share of tokens above 0; the code has 0.3"),
    }
    for name, (value, words) in refused.items():
        with pytest.raises(VTCError, match=words):
            vtc.create("flashvid", **{name: value})
    with pytest.raises(UnsupportedMethod, match="has one layer; nothing can be dropped inside"):
        vtc.create("flashvid").plan(dataclasses.replace(CLIP_L, llm_layers=1))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str, nears_budget: Any) -> None:
    def rounding(layers: int, items: int) -> float:
        return (layers - max(1, 20 * layers // 28)) / layers / 2 * items + 1e-9

    nears_budget(name, "flashvid", (0.3, 0.7, 1.0), rounding)
