"""VScan against its rules, one window, one crop and one token at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec, Needs, Rows
from vtc.method.two_stages import schedule
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
SIGLIP = ModelSpec("llava", 27, 26, False, tuple(range(27)), 32)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 28, mrope=True)


def best(scores: list[float], among: list[int], count: int) -> list[int]:
    return sorted(among, key=lambda j: (-scores[j], j))[:count]


def plain_choice(
    early: list[float], late: list[float], cells: list[tuple[int, int]], keep: int, *, shared: bool
) -> list[int]:
    """The tokens of one crop; cells: the window of each, which gets a share of its own or has a limit alone."""
    everything = range(len(cells))
    windows = {cell: [j for j in everything if cells[j] == cell] for cell in cells}
    if shared:
        shares = {cell: (keep // 2) * len(members) // len(cells) for cell, members in windows.items()}
        local = [j for cell, members in windows.items() for j in best(early, members, shares[cell])]
    else:
        local, room = [], dict.fromkeys(windows, -(-(keep // 2) // len(windows)))
        for j in best(early, list(everything), len(cells)):
            if len(local) < keep // 2 and room[cells[j]]:
                local.append(j)
                room[cells[j]] -= 1
    others = [j for j in everything if j not in local]
    return sorted(local + best(late, others, keep - len(local)))


def seen(make_view: Any, shapes: Any, spec: ModelSpec, **budget: Any) -> Any:
    """A view with attention that has ties."""
    generator = torch.Generator().manual_seed(3)
    counts = [len(s.item().crop) if hasattr(s, "item") else s[0] * s[1] for s in shapes]
    method: Any = vtc.create("vscan")
    vision = {
        (layer, spec.patch_attention): [torch.rand(n, generator=generator).mul(40).round().div(1000) for n in counts]
        for layer in (method.early(spec), spec.key_layer)
    }
    return make_view(shapes, vision=vision, spec=spec, **budget)


@pytest.mark.parametrize("spec", [CLIP_L, QWEN], ids=["cls", "received"])
@pytest.mark.parametrize("window", [2, 3, None])
@pytest.mark.parametrize("keep", [9, 12, 21])
def test_the_plain_choice_and_means(
    make_view: Any, kept: Any, shares: Any, shape: Any, spec: ModelSpec, window: int | None, keep: int, limits: Any
) -> None:
    shapes = [shape(((1, 3, 3), (1, 7, 5)), newlines=True), (7, 7), (1, 1), shape(((4, 3, 3),))]
    view = seen(make_view, shapes, spec, keep=keep)
    method: Any = vtc.create("vscan", window=window)
    selection = method.select(view)
    counts = [first for first, _ in schedule(view, spec.llm_layers // 2, method.later)]
    found = kept(view, selection)
    side = window or (6 if spec.has_cls else 8)
    layers = method.early(spec), spec.key_layer
    early, late = (view.vision_attention(layer, spec.patch_attention) for layer in layers)
    row, col = view.place
    for item, count in enumerate(view.items.counts):
        crop = view.crop[item, :count].tolist()
        parts = [[p for p in range(count) if crop[p] == c] for c in range(max(crop) + 1)]
        chosen: list[int] = []
        for part, few in zip(parts, shares(counts[item], [len(part) for part in parts]), strict=True):
            cells = [(int(row[item, p] // side), int(col[item, p] // side)) for p in part]
            values = ([scores[item, p].item() for p in part] for scores in (early, late))
            own = [part[j] for j in plain_choice(*values, cells, few, shared=spec.has_cls)]
            chosen += own
            x = view.tokens[item].double()
            unit = x / x.norm(dim=1, keepdim=True)
            into: dict[int, list[int]] = {p: [p] for p in own}
            for p in part:
                if own and p not in own:
                    into[max(own, key=lambda q: (float(unit[p] @ unit[q]), -q))].append(p)
            for p, members in into.items():
                assert float((selection.tokens[item, p] - x[members].mean(0)).abs().max()) <= limits.hidden
                assert selection.merged_into[item, members].tolist() == [p] * len(members)
        assert found[item] == [int(view.items.token[item, p]) for p in sorted(chosen)]


def test_published_counts(make_view: Any) -> None:
    """96 and 32 tokens for 64; where the first stage would keep all, the second one leaves more than a third."""
    method: Any = vtc.create("vscan")
    assert schedule(seen(make_view, [(24, 24)], CLIP_L, keep=64), 16, method.later) == [(96, 32)]
    ((first, later),) = schedule(seen(make_view, [(24, 24)], CLIP_L, retention=0.8), 16, method.later)
    assert first == 576 and abs((576 + later) / 2 - 0.8 * 576) <= 0.5
    assert schedule(seen(make_view, [(24, 24), (3, 3)], CLIP_L, keep=9), 16, method.later) == [(13, 4), (9, 9)]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str, nears_budget: Any) -> None:
    nears_budget(name, "vscan", (0.3, 0.7, 1.0))


@torch.no_grad()
def test_the_second_stage_is_that_of_eager_attention() -> None:
    """With all tokens in front of it: what the last row of the prompt looks at in the middle layer."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3, "image", 5], [2, "image", 12]], seed=2)
    with vtc.compress(model, "vscan", retention=0.8) as handle:
        model(**inputs)
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[2]
    for record in handle.trace[0].items:
        scores = [weights[record.row].mean(0)[-1, place].item() for place in record.positions]
        expected = sorted(best(scores, list(range(len(scores))), len(record.kept[2])))
        assert record.kept[2].tolist() == expected and len(expected) < len(scores)


def test_plans_and_refusals() -> None:
    method: Any = vtc.create("vscan")
    assert dataclasses.asdict(method) == {"window": None, "later": 1 / 3}
    for spec, layers, reading in (
        (CLIP_L, (5, 22), Rows.CLS), (SIGLIP, (6, 26), Rows.RECEIVED), (QWEN, (7, 31), Rows.RECEIVED)
    ):  # fmt: skip
        plan = method.plan(spec)
        middle = spec.llm_layers // 2
        assert plan.needs == Needs(dict.fromkeys(layers, reading), {middle: Rows.LAST_AHEAD})
        assert (plan.stages, plan.positions) == ((0, middle), "preserve" if spec.mrope else "compact")
    for options in ({"window": 0}, {"later": 0.0}, {"later": 1.5}):
        with pytest.raises(VTCError, match="a window has at least one patch"):
            vtc.create("vscan", **options)
    with pytest.raises(UnsupportedMethod, match="has one layer; nothing can be dropped inside"):
        method.plan(dataclasses.replace(CLIP_L, llm_layers=1))
