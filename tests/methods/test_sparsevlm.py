"""SparseVLM against its rules, one word and one token at a time, and against the model's own eager attention."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.method.base import ModelSpec
from vtc.methods.sparsevlm import TEXT, SparseVLM
from vtc.testing import TINY_MODELS, check_method, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT
from vtc.testing.measures import generate
from vtc.testing.plain.density import plain_density_peaks
from vtc.testing.reference import entering, reference

LLAMA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2.5-vl", 32, 31, False, (7, 15, 23, 31), 28, mrope=True)
SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (12, 12)]


def plain_raters(visual: Tensor, text: Tensor) -> list[bool]:
    """visual [n, D], text [m, D] of one prompt: which words a visual token finds alike more often than the mean."""
    likes = [0.0] * len(text)
    for v in visual.double():
        weights = [math.exp(min(700.0, float(v @ t))) for t in text.double()]
        likes = [like + weight / sum(weights) for like, weight in zip(likes, weights, strict=True)]
    return [like >= sum(likes) / len(likes) - 1e-6 for like in likes]


def plain_recycling(x: Tensor, score: list[float], keep: int, number: int, groups: int) -> tuple[list[int], Any]:
    """What stays, and for every recycled token the centre it goes to."""
    order = sorted(range(len(score)), key=lambda j: (-score[j], j))
    again = sorted(order[keep : keep + number])
    if not again:
        return sorted(order[:keep]), {}
    every = torch.ones(1, len(again), dtype=torch.bool)
    (centres,) = plain_density_peaks(x[again][None], torch.tensor([groups]), every, groups).tolist()
    return sorted(order[:keep]), {place: again[centre] for place, centre in zip(again, centres, strict=True)}


def seen(
    make_view: Any, method: SparseVLM, layer: int, shapes: Any = SHAPES, spec: ModelSpec = LLAMA, **budget: Any
) -> Any:
    """A view behind LLM layer `layer`, with attention of five text rows that has ties."""
    view = make_view(shapes, stage=layer + 1, spec=spec, width=8, **budget)
    generator = torch.Generator().manual_seed(layer)
    rows = torch.rand(5, *view.visual.shape, generator=generator).mul(40).round().div(1000)
    rate = torch.rand(len(view.visual), 7, generator=generator) < 0.6
    rate[:, 0] = True
    return dataclasses.replace(view, llm_rows={(layer, TEXT): rows}, memory={(method, "raters"): rate})


@pytest.mark.parametrize("options", [{}, {"recycle": 0.0}, {"recycle": 0.9}], ids=str)
@pytest.mark.parametrize("budget", [{"retention": 1 / 3}, {"retention": 0.7}, {"keep": 40}], ids=str)
@pytest.mark.parametrize("layer", [2, 6, 15])
def test_the_plain_choice(make_view: Any, kept: Any, options: Any, budget: Any, layer: int) -> None:
    method = SparseVLM(**options)
    view = seen(make_view, method, layer, **budget)
    selection = method.select(view)
    found = kept(view, selection)
    parts = method.parts(view, layer + 1)
    rows, rate = view.llm_rows[layer, TEXT], view.memory[method, "raters"]
    for item, (keep, number, groups) in enumerate(parts):
        count, row = view.items.counts[item], view.items.rows[item]
        paid = rows[:, row, view.items.index[item, :count]].double()
        voices = [m for m in range(5) if rate[row, m]]
        score = [round(sum(float(paid[m, j]) for m in voices) / len(voices), 7) for j in range(count)]
        x = view.tokens[item, :count]
        best, joins = plain_recycling(x, score, keep, number, groups)
        assert found[item] == sorted({*best, *joins.values()})
        assert len(found[item]) == keep + groups
        for centre in set(joins.values()):
            members = [place for place, into in joins.items() if into == centre]
            mean = x[members].double().mean(0)
            assert torch.allclose(selection.tokens[item, centre].double(), mean, atol=1e-5)
        if selection.tokens is not None:
            into = {**dict.fromkeys(range(count), -1), **{p: p for p in best}, **joins}
            assert selection.merged_into[item, :count].tolist() == [into[p] for p in range(count)]
            assert torch.equal(selection.tokens[item, best], x[best])


def test_raters_are_the_words_that_visual_tokens_resemble(make_view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(SHAPES, keep=9, width=4)
    for block in (1 << 24, 7):
        monkeypatch.setattr("vtc.methods.sparsevlm.BLOCK", block)
        method = SparseVLM()
        assert method.select(view) is None
        found = view.memory[method, "raters"]
        for row in range(len(view.text)):
            items = [item for item in range(len(view.items)) if view.items.rows[item] == row]
            first = int(view.visual[row].nonzero()[0])
            words = [p for p in view.text[row].nonzero().flatten().tolist() if p > first]
            visual = torch.cat([view.tokens[item, : view.items.counts[item]] for item in items])
            expected = plain_raters(visual, view.hidden[row, words])
            assert found[row].tolist() == expected + [False] * (found.shape[1] - len(words))
            assert any(expected) and (not all(expected) or len(expected) == 1)


def test_one_word_rates_and_without_words_the_first_stay(make_view: Any, kept: Any) -> None:
    method, view = SparseVLM(), make_view([(3, 3)], keep=4)
    one = view.text & (view.text.cumsum(1) == view.text.sum(1, keepdim=True))
    view = dataclasses.replace(view, text=one)
    method.select(view)
    assert view.memory[method, "raters"].sum() == 1
    method = SparseVLM(ratios=(0.5, 0.4, 0.3), recycle=0.0)
    view = seen(make_view, method, 2, [(3, 3)])
    view = dataclasses.replace(view, memory={(method, "raters"): torch.zeros(1, 7, dtype=torch.bool)})
    assert kept(view, method.select(view)) == [[0, 1, 2, 3, 4]]


def test_published_counts(make_view: Any) -> None:
    """Behind layers 2, 6 and 15, merged tokens on top: 300 of 576 stay, 83 of 276 become 9 groups."""
    method = vtc.create("sparsevlm", ratios=(300 / 576, 200 / 576, 110 / 576))
    assert isinstance(method, SparseVLM) and not method.needs_budget
    for layer, now, expected in ((2, 576, (300, 83, 9)), (6, 309, (200, 33, 4)), (15, 204, (110, 29, 3))):
        view = seen(make_view, method, layer, [(24, 24)])
        items = dataclasses.replace(view.items, counts=(now,), entered=(576,))
        assert method.parts(dataclasses.replace(view, items=items), layer + 1) == [expected]


def behind(make_view: Any, budget: dict[str, float], **options: Any) -> list[tuple[int, int, int]]:
    """Of 576 tokens what stays, is recycled, and the groups of that, stage by stage."""
    method, now, found = SparseVLM(**options), 576, []
    for layer in method.layers:
        view = seen(make_view, method, layer, [(24, 24)], **budget)
        items = dataclasses.replace(view.items, counts=(now,))
        ((stay, number, groups),) = method.parts(dataclasses.replace(view, items=items), layer + 1)
        now = stay + groups
        found.append((stay, number, groups))
    return found


RELEASED = {
    "192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17)
}  # fmt: skip
"""Tokens that stay behind layers 2, 6 and 15 of 32, of 576, by label."""


@pytest.mark.parametrize("label", RELEASED)
def test_budgets_of_released_tables_are_those_tables(make_view: Any, label: str) -> None:
    """Their means are no whole numbers, so that a token more or less of a stage may be nearer to the budget."""
    now, left = 576, []
    for stay in RELEASED[label]:
        now = stay + (int(0.3 * (now - stay)) + 1) // 10 + 1
        left.append(now)
    mean = (3 * 576 + 4 * left[0] + 9 * left[1] + 16 * left[2]) / 32
    assert {"192": 206.5, "128": 145.4, "96": 114.1, "64": 82.3}[label] == pytest.approx(mean, abs=0.06)
    for budget in ({"keep": round(mean)}, {"retention": mean / 576}):
        found = behind(make_view, budget)
        assert [stay + groups for stay, _, groups in found] == pytest.approx(left, abs=1)
        assert [stay for stay, _, _ in found] == pytest.approx(RELEASED[label], abs=1)


def test_budgets_between_the_tables_lie_between_them(make_view: Any) -> None:
    wanted = [(a + b) / 2 for a, b in zip((312, 117, 39), (249, 55, 27), strict=True)]
    found = behind(make_view, {"keep": round((3 * 576 + 4 * wanted[0] + 9 * wanted[1] + 16 * wanted[2]) / 32)})
    assert [stay + groups for stay, _, groups in found] == pytest.approx(wanted, abs=2)
    other = [stay + groups for stay, _, groups in behind(make_view, {"keep": 200}, layers=(4, 8, 16))]
    assert other[2] / other[1] == pytest.approx(other[1] / other[0], abs=0.02)


@pytest.mark.parametrize("retention", [0.12, 0.25, 1 / 3, 0.6, 0.95])
def test_the_mean_over_the_layers_meets_the_budget(make_view: Any, retention: float) -> None:
    left = [stay + groups for stay, _, groups in behind(make_view, {"retention": retention})]
    mean = (3 * 576 + 4 * left[0] + 9 * left[1] + 16 * left[2]) / 32
    assert abs(mean - vtc.tokens_to_keep(576, retention)) <= 0.5
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("recycle", [0.0, 0.3, 0.99])
def test_a_split_is_exact(recycle: float) -> None:
    method = SparseVLM(recycle=recycle)
    for now in range(1, 60):
        for total in range(1, now + 1):
            stay, number, groups = method.split(now, total)
            assert stay >= 1 and stay + groups == total and stay + number <= now
            assert (number, groups) in ((0, 0), method.groups(now - stay))


def test_plans_and_refusals() -> None:
    assert dataclasses.asdict(SparseVLM()) == {
        "layers": (2, 6, 15), "ratios": None, "schedule": None, "recycle": None, "count": "budget", "scale": 0.5
    }  # fmt: skip
    for spec, layers, positions in ((LLAMA, (2, 6, 15), "compact"), (QWEN, (2, 5, 13), "preserve")):
        plan = SparseVLM().plan(spec)
        assert plan.stages == (0, *(layer + 1 for layer in layers))
        assert (plan.needs, plan.positions) == (vtc.Needs(llm=dict.fromkeys(layers, TEXT)), positions)
    assert SparseVLM().least_retention(LLAMA) == 3 / 32
    for options, message in (
        ({"layers": (6, 2)}, r"layers=\(6, 2\) must rise, begin at 0 or later and end at 30"),
        ({"layers": (2, 31)}, r"end at 30 at the latest; the paper uses \(2, 6, 15\) of 32"),
        ({"ratios": (0.5, 0.2)}, "one for each of 3 layers"),
        ({"ratios": (0.5, 0.2, 0.3)}, "must fall and lie between 0 and 1"),
        ({"scale": 0.0}, "scale=0.0 is no share of what the rank lacks; pass a number above 0 up to 1"),
        ({"count": "rank", "schedule": "cosine"}, "count='rank' says how many tokens leave; leave out ratios and"),
        ({"count": "rank", "ratios": (0.5, 0.4, 0.3)}, "leave out ratios and schedule beside it"),
        ({"count": "pivots"}, "unknown count 'pivots'"),
        ({"recycle": 1}, "recycle=1.0 is no share of what leaves; the code has 0.3, 0 merges nothing"),
    ):
        with pytest.raises(VTCError, match=message):
            vtc.create("sparsevlm", **options)
    few = dataclasses.replace(LLAMA, llm_layers=2)
    with pytest.raises(UnsupportedMethod, match=r"are 1 of this llava model's 2 LLM layers; pass layers that are"):
        SparseVLM(ratios=(0.5, 0.4, 0.3)).plan(few)
    with pytest.raises(BudgetError, match="cannot be met by 'sparsevlm'"):
        vtc.compress(tiny_model("llava-clip"), "sparsevlm", retention=0.2)


# --- as many as the rank lacks
def plain_rank(rows: list[list[int]]) -> int:
    """Of whole numbers, by elimination with fractions."""
    left, rank = [[Fraction(number) for number in row] for row in rows], 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((row for row in left if row[column]), None)
        if pivot is not None:
            left.remove(pivot)
            left = [[a - b * row[column] / pivot[column] for a, b in zip(row, pivot, strict=True)] for row in left]
            rank += 1
    return rank


@pytest.mark.parametrize("options", [{}, {"recycle": 0.0}, {"scale": 1.0}, {"scale": 0.2, "recycle": 0.9}], ids=str)
@pytest.mark.parametrize("layer", [2, 15])
def test_the_plain_count_and_choice_of_the_rank(make_view: Any, kept: Any, options: Any, layer: int) -> None:
    """Whole numbers for attention, of which one row is the sum of two others and one is another's double."""
    method = SparseVLM(count="rank", **options)
    view = seen(make_view, method, layer)
    rows = (view.llm_rows[layer, TEXT] * 1000).round()
    rows[2], rows[4] = rows[0] + rows[1], 2 * rows[3]
    rate = view.memory[method, "raters"].clone()
    rate[0] = True
    rate[-1] = False  # nobody asks
    view = dataclasses.replace(view, llm_rows={(layer, TEXT): rows}, memory={(method, "raters"): rate})
    selection = method.select(view)
    assert selection.counts is None
    scale, share = options.get("scale", 0.5), options.get("recycle", 0.5)
    found, lacks = kept(view, selection), []
    for item, count in enumerate(view.items.counts):
        row = view.items.rows[item]
        paid = rows[:, row, view.items.index[item, :count]]
        voices = [m for m in range(5) if rate[row, m]]
        rank = plain_rank([[int(number) for number in paid[m]] for m in voices])
        lacks.append(len(voices) - rank)
        dropped = min(count - 1, math.floor(scale * (count - rank) + 1e-6))
        number = math.floor(share * dropped + 1e-6)
        groups = number // 2
        score = [round(sum(float(paid[m, j]) for m in voices) / max(1, len(voices)), 4) for j in range(count)]
        best, joins = plain_recycling(view.tokens[item, :count], score, count - dropped, number * (groups > 0), groups)
        assert found[item] == sorted({*best, *joins.values()})
        assert len(found[item]) == count - dropped + groups
        for centre in set(joins.values()):
            members = [place for place, into in joins.items() if into == centre]
            mean = view.tokens[item, members].double().mean(0)
            assert torch.allclose(selection.tokens[item, centre].double(), mean, atol=1e-5)
    assert max(lacks) == 2


def test_items_have_ranks_of_their_own(make_view: Any, kept: Any) -> None:
    """Of a batch as alone, to the count, though smaller items are padded."""
    method = SparseVLM(count="rank")
    view = seen(make_view, method, 2)
    found = kept(view, method.select(view))
    for item, shape in enumerate(SHAPES):
        alone = seen(make_view, method, 2, [shape])
        count, row = view.items.counts[item], view.items.rows[item]
        rows = torch.zeros_like(alone.llm_rows[2, TEXT])
        rows[:, 0, alone.items.index[0]] = view.llm_rows[2, TEXT][:, row, view.items.index[item, :count]]
        states = {(2, TEXT): rows}
        alone = dataclasses.replace(
            alone, llm_rows=states, memory={(method, "raters"): view.memory[method, "raters"][row:][:1]}
        )
        assert len(kept(alone, method.select(alone))[0]) == len(found[item])


@torch.no_grad()
def test_the_rank_is_that_of_eager_attention() -> None:
    """Behind layer 0 of 4, and of what is left behind layer 1."""
    model = tiny_model("llava-next")
    inputs = tiny_inputs("llava-next", [["image", 7]], seed=2, model=model)
    with vtc.compress(model, "sparsevlm", count="rank", recycle=0.0) as handle:
        model(**inputs)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    rows, weights = output.hidden_states[0][0], output.attentions[0][0].mean(0)
    (item,) = handle.trace[0].items
    at, newlines = item.positions.tolist(), set(item.layout.newline.nonzero().flatten().tolist())
    real = [j for j in range(len(at)) if j not in newlines]
    words = list(range(at[-1] + 1, len(rows)))
    rate = plain_raters(rows[[at[j] for j in real]], rows[words])
    paid = weights[[word for word, one in zip(words, rate, strict=True) if one]][:, [at[j] for j in real]]
    singular = torch.linalg.svdvals(paid.double())
    rank = int((singular > max(paid.shape) * torch.finfo(torch.float32).eps * singular[0]).sum())
    assert 0 < rank <= len(paid)
    left = [j for j in item.kept[1].tolist() if j not in newlines]
    assert len(left) == len(real) - (len(real) - rank) // 2
    fewer = [len([j for j in item.kept[stage].tolist() if j not in newlines]) for stage in (1, 2, 3)]
    assert fewer == sorted(fewer, reverse=True) and fewer[2] < fewer[1] < fewer[0]


def test_counts_by_the_rank_keep_the_contract() -> None:
    """Merged tokens and counts that differ from row to row included."""
    check_method(vtc.create("sparsevlm", count="rank"), models=["llava-next"], generation=["greedy"], steps=2)


# --- on models
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "llava-next"])
def test_the_kept_set_is_that_of_eager_attention(name: str) -> None:
    """The first stage, behind layer 0 of 4; nothing recycled, so that what stays is ranked alone."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, [["image", 9]], seed=2, model=model)
    with vtc.compress(model, "sparsevlm", retention=0.6, recycle=0.0) as handle:
        model(**inputs)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    rows, weights = output.hidden_states[0][0], output.attentions[0][0].mean(0)
    (item,) = handle.trace[0].items
    at = item.positions.tolist()
    words = list(range(at[-1] + 1, len(rows)))
    newlines = set(item.layout.newline.nonzero().flatten().tolist())
    real = [j for j in range(len(at)) if j not in newlines]
    rate = plain_raters(rows[[at[j] for j in real]], rows[words])
    voices = [word for word, one in zip(words, rate, strict=True) if one]
    score = {j: round(sum(float(weights[v, at[j]]) for v in voices), 9) for j in real}
    found = [j for j in item.kept[1].tolist() if j not in newlines]
    assert found == sorted(sorted(real, key=lambda j: (-score[j], j))[: len(found)])


def test_merged_rows_are_part_of_the_reference() -> None:
    """An oracle that is not told them differs by more than rounding."""
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[4, "image", 3], [2, "image", 12]], model=model)
    handle = vtc.compress(model, "sparsevlm", retention=0.6)
    with entering(model, handle) as rows:
        _, found = generate(model, inputs, handle, 3)
    handle.detach()
    merged = [item.merged_into[stage] for item in handle.trace[0].items for stage in (1, 2, 3)]
    assert any(len(set(each.tolist()) - {-1}) < int((each >= 0).sum()) for each in merged)
    (_, told), (_, untold) = (generate(model, inputs, reference(model, handle, each), 3) for each in (rows, None))
    assert float((found - told).abs().max()) <= LIMIT < float((found - untold).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_budget_is_met_on_every_model(name: str) -> None:
    model = tiny_model(name)
    for kind in TINY_MODELS[name].kinds:
        inputs = tiny_inputs(name, [[4, kind, 3, kind, 5], [2, kind, 12]], seed=1, model=model)
        with vtc.compress(model, "sparsevlm", retention=0.6) as handle:
            model(**inputs)
        items = handle.trace[0].items
        wanted = sum(vtc.tokens_to_keep(len(item.positions), 0.6) for item in items)
        assert abs(sum(handle.stats.calls[0].visual_tokens_kept) - wanted) <= 0.5 * len(items)
