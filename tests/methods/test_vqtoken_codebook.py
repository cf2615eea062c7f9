"""The training-free part of VQToken against its steps, one item, one token at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc.errors import UnknownName, VTCError
from vtc.method.base import ModelSpec
from vtc.method.states import States
from vtc.methods.vqtoken import cluster
from vtc.methods.vqtoken.codebook import VQTokenCodebook
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain import cluster as plain

LLAVA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, single_crop=True, width=4096)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True, width=3584)
SHAPES = [(7, 9), (6, 6), (1, 1), (2, 3), (8, 8)]


# --- clustering
@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Tokens of few values, so that some are equal and some are zero; runs of different size; padding."""
    items, runs, places, width = (draw(st.integers(1, most)) for most in (3, 2, 12, 3))
    values = st.lists(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), min_size=width, max_size=width)
    tokens = torch.tensor(draw(st.lists(values, min_size=items * places, max_size=items * places)))
    lengths = draw(st.lists(st.integers(1, places), min_size=items, max_size=items))
    counts = [[draw(st.integers(1, length)) for _ in range(runs)] for length in lengths]
    most = max(map(max, counts))
    start = [
        [[draw(st.integers(0, n - 1)) for _ in range(most)] for _ in row]
        for n, row in zip(lengths, counts, strict=True)
    ]
    mask = torch.arange(places) < torch.tensor(lengths)[:, None]
    return {
        "tokens": tokens.view(items, places, width),
        "start": torch.tensor(start),
        "counts": torch.tensor(counts),
        "mask": mask,
    }


def near_ties(tokens: Tensor, centres: Tensor, counts: Tensor) -> bool:
    """True when rounding may decide between two centres that are not equal."""
    u = torch.nn.functional.normalize(tokens.double(), dim=-1)
    c = torch.nn.functional.normalize(centres.double(), dim=-1)
    cosine = torch.einsum("ind,irkd->irnk", u, c)
    cosine = cosine.masked_fill(torch.arange(c.shape[2]) >= counts[:, :, None, None], -2)
    gaps = cosine.sort(-1, descending=True).values.diff(dim=-1).abs()
    return bool(((gaps < 1e-5) & (gaps > 0)).any()) or bool((gaps == 0).any() and c.shape[2] > 1)


@given(problems())
def test_kmeans(given: dict[str, Any]) -> None:
    for steps in (1, 2, 7):
        found, expected = cluster.kmeans(**given, iterations=steps), plain.kmeans(**given, iterations=steps)
        assume(not near_ties(given["tokens"], expected.centres, given["counts"]))
        assert torch.equal(found.labels, expected.labels)
        live = torch.arange(found.centres.shape[2]) < given["counts"][..., None]
        assert torch.allclose(found.centres[live], expected.centres[live], atol=1e-5)


@given(problems(), st.integers(0, 2**40), st.integers(0, 3))
def test_seeds(given: dict[str, Any], key: int, seed: int) -> None:
    items, places, _ = given["tokens"].shape
    more = {
        "width": given["start"].shape[2],
        "key": torch.arange(items) * 77 + key,
        "token": torch.arange(places).expand(items, -1) + 5,
        "seed": seed,
    }
    arguments = {k: given[k] for k in ("tokens", "counts", "mask")} | more
    assert torch.equal(cluster.seed_centres(**arguments), plain.seed_centres(**arguments))


def test_draws_follow_the_squared_distance() -> None:
    """Angles of 0, 60 and 180 degrees to the first token: squared distances 0, 1 and 4."""
    tokens = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)], [-1.0, 0.0]]).expand(30_000, -1, -1) * 5
    mask, two = torch.ones(30_000, 3, dtype=torch.bool), torch.full((30_000, 1), 2)
    start = cluster.seed_centres(tokens, two, 2, torch.arange(30_000), torch.arange(3).expand(30_000, -1), mask)[:, 0]
    first = start[:, 0].bincount(minlength=3) / 30_000
    assert torch.allclose(first, torch.full((3,), 1 / 3), atol=0.01)
    second = start[start[:, 0] == 0, 1].bincount(minlength=3).float()
    assert torch.allclose(second / second.sum(), torch.tensor([0.0, 0.2, 0.8]), atol=0.015)


@given(problems(), st.data())
def test_parts_of_the_codebook(given: dict[str, Any], data: st.DataObject) -> None:
    tokens, mask = given["tokens"], given["mask"]
    items, places = mask.shape
    width = data.draw(st.integers(1, places))
    numbers = st.lists(st.integers(0, width - 1), min_size=places, max_size=places)
    labels = torch.tensor(data.draw(st.lists(numbers, min_size=items, max_size=items)))
    for normalized in (True, False):
        codes, sizes = cluster.codebook(tokens, labels, width, mask, normalized=normalized)
        expected, counts = plain.codebook(tokens, labels, width, mask, normalized=normalized)
        assert torch.allclose(codes, expected, atol=1e-6)
        assert torch.equal(sizes, counts)
    members = cluster.describe(labels, width, mask)
    for found, expected in zip(members, plain.describe(labels, width, mask), strict=True):
        assert torch.equal(found, expected)
    for order in ("first", "cluster_id", "size"):
        ranks = cluster.ordering(members, order)  # type: ignore[arg-type]
        assert torch.equal(ranks, plain.ordering(members, order))
        assert torch.equal(cluster.relabel(labels, ranks), plain.relabel(labels, ranks))
    for item, chosen in enumerate(cluster.medoids(tokens, labels, width, mask).tolist()):
        cosine = plain.likeness(tokens[item], labels[item, mask[item]].tolist())
        for number, place in enumerate(chosen):
            own = [p for p in range(len(cosine)) if labels[item, p] == number]
            assert (place == -1) == (not own)
            assert not own or (place in own and cosine[place] > max(cosine[p] for p in own) - 2e-6)


@given(problems(), st.data())
def test_no_cluster_stays_empty(given: dict[str, Any], data: st.DataObject) -> None:
    tokens, mask, counts = given["tokens"], given["mask"], given["counts"][:, 0]
    width = int(counts.max())
    top = [data.draw(st.integers(0, int(count) - 1)) for count in counts]
    labels = torch.stack([torch.randint(high + 1, mask.shape[1:]) for high in top])
    found = cluster.split_empty(tokens, labels, counts, width, mask)
    before, after = cluster.describe(labels, width, mask).sizes, cluster.describe(found, width, mask).sizes
    assert torch.equal(after > 0, torch.arange(width) < counts[:, None])
    moved = (found != labels) & mask
    assert torch.equal(moved.sum(1), ((before == 0) & (torch.arange(width) < counts[:, None])).sum(1))
    assert (before.gather(1, found)[moved] == 0).all()


def test_equal_centres_leave_the_later_one_empty() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [-3.0, 1.0], [2.0, 4.0]]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = cluster.kmeans(tokens, torch.tensor([[[2, 0, 1]]]), torch.tensor([[3]]), mask)
    assert found.labels.tolist() == [[[1, 1, 0, 1]]]
    assert torch.allclose(found.centres[0, 0, 2], tokens[0, 1] / 5**0.5)


def test_a_converged_run_keeps_the_centres_of_its_labels() -> None:
    arguments = plain.CASES[1].make("small")
    long = cluster.kmeans(**{**arguments, "iterations": 50})
    assert bool(long.converged.all())
    live = torch.arange(long.centres.shape[2]) < arguments["counts"][..., None]
    again = cluster.nearest_centre(arguments["tokens"], long.centres, live)
    assert torch.equal(again.masked_fill(~arguments["mask"][:, None], 0), long.labels)
    assert not bool(cluster.kmeans(**{**arguments, "iterations": 1}).converged.any())


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = plain.CASES[1].make("small")
    whole = cluster.kmeans(**arguments)
    monkeypatch.setattr(cluster, "_LIMIT", 200)
    split = cluster.kmeans(**arguments)
    assert torch.equal(whole.labels, split.labels)
    assert torch.allclose(whole.centres, split.centres, atol=1e-6)


def test_the_rules_of_the_elbow() -> None:
    kinked = torch.tensor([[21.0 - r - 5 * (r > k) for r in range(21)] for k in (0, 3, 18)])
    assert cluster.elbow(kinked, 12).tolist() == [12, 12, 22]
    bend = torch.tensor([[max(0.0, k - r) for r in range(21)] for k in (1, 10, 19)])
    assert cluster.elbow(bend, 12).tolist() == [12, 13, 22]
    assert cluster.elbow(bend, 12, rule="corrected").tolist() == [13, 22, 31]


@pytest.mark.parametrize("runs", [(300,), tuple(range(12, 33))], ids=["300 clusters", "elbow"])
def test_long_videos_stay_small(peak_memory: Any, runs: tuple[int, ...]) -> None:
    setup = (
        "from vtc.methods.vqtoken import cluster\n"
        "tokens, mask = torch.randn(1, 100_000, 64, dtype=torch.bfloat16), torch.ones(1, 100_000, dtype=torch.bool)\n"
        f"counts, most = torch.tensor([{list(runs)}]), {max(runs)}\n"
        "start = torch.randint(100_000, (1, counts.numel(), most))\n"
        "key, token = torch.tensor([1]), torch.arange(100_000)[None]\n"
    )
    code = (
        "cluster.seed_centres(tokens, counts.clamp(max=2), 2, key, token, mask)\n"
        "found = cluster.kmeans(tokens, start, counts, mask, iterations=1)\n"
        "cluster.distortion(tokens, found, mask)\n"
        "labels = cluster.split_empty(tokens, found.labels[:, 0], counts[:, 0], most, mask)\n"
        "cluster.medoids(tokens, labels, most, mask)"
    )
    assert peak_memory(setup, code) < 1.2 * 2**30


# --- codebook only
def expected_rows(view: Any, method: VQTokenCodebook) -> tuple[list[list[int]], list[Tensor], list[list[int]]]:
    """Anchors, rows in output order, and the output row of every token, of each item with a given K."""
    mask, counts = view.items.mask, torch.tensor(view.keep)[:, None]
    most = int(counts.max())
    start = plain.seed_centres(view.tokens, counts, most, view.fingerprint, view.items.token, mask, seed=method.seed)
    labels = plain.kmeans(view.tokens, start, counts, mask).labels[:, 0]
    labels = plain.split_empty(view.tokens, labels, counts[:, 0], most, mask)
    normalized = method.codebook_space == "normalized"
    codes, sizes = plain.codebook(view.tokens, labels, most, mask, normalized=normalized)
    first = plain.describe(labels, most, mask).first
    medoid = plain.medoids(view.tokens, labels, most, mask)
    anchors, rows, owners = [], [], []
    for i, n in enumerate(view.items.counts):
        place = (medoid if method.representative == "medoid" else first)[i].tolist()
        keys = {
            "first": lambda k, i=i: (int(first[i, k]),),
            "cluster_id": lambda k: (k,),
            "size": lambda k, i=i: (-int(sizes[i, k]), int(first[i, k])),
            "place": lambda k, place=place: (place[k],),
        }
        order = sorted((k for k in range(most) if sizes[i, k]), key=keys[method.order])
        if method.representative == "medoid":
            held = view.tokens[i, [place[k] for k in order]]
            rows.append(torch.nn.functional.normalize(held, dim=-1) if normalized else held)
        else:
            rows.append(codes[i, order])
        anchors.append(sorted(place[k] for k in order))
        owners.append([order.index(int(label)) for label in labels[i, :n]])
    return anchors, rows, owners


@pytest.mark.parametrize("budget", [{"keep": 1}, {"keep": 12}, {"retention": 1 / 2}, {"keep": 10**4}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"order": "size", "seed": 3},
        {"order": "cluster_id", "codebook_space": "normalized"},
        {"representative": "medoid", "order": "place"},
        {"representative": "medoid", "codebook_space": "normalized"},
    ],
    ids=str,
)
def test_the_plain_rows(make_view: Any, kept: Any, budget: Any, options: Any) -> None:
    view, method = make_view(SHAPES, **budget), VQTokenCodebook(**options)
    selection = method.select(view)
    assert selection is not None
    assert selection.tokens is not None and selection.merged_into is not None
    anchors, rows, owners = expected_rows(view, method)
    assert kept(view, selection) == anchors
    assert list(selection.counts or []) == list(view.keep)
    for item, (places, expected, owner) in enumerate(zip(anchors, rows, owners, strict=True)):
        assert torch.allclose(selection.tokens[item, places], expected, atol=1e-5)
        assert [places[row] for row in owner] == selection.merged_into[item, : len(owner)].tolist()


def test_all_tokens_stay_when_the_budget_pays_for_all(make_view: Any) -> None:
    view = make_view(SHAPES, keep=10**4)
    selection = VQTokenCodebook().select(view)
    assert torch.equal(selection.keep & view.items.mask, view.items.mask)
    assert torch.allclose(selection.tokens[view.items.mask], view.tokens[view.items.mask], atol=1e-5)


def test_equal_tokens_still_give_the_exact_count(make_view: Any) -> None:
    view = make_view([(4, 4), (3, 3)], keep=7)
    view = dataclasses.replace(view, states=States(torch.ones_like(view.hidden)))
    assert ((VQTokenCodebook().select(view).keep & view.items.mask).sum(1) == 7).all()
    dropped = VQTokenCodebook(empty="drop").select(view)
    assert dropped.counts is None
    assert ((dropped.keep & view.items.mask).sum(1) == 1).all()


def test_items_that_lost_their_tokens_stay_empty(make_view: Any, kept: Any) -> None:
    view = make_view([(4, 4), (2, 3)], keep=5)
    for counts in ((0, 6), (0, 0)):
        mask = torch.arange(max(max(counts), 1)) < torch.tensor(counts)[:, None]
        mask = mask[:, : max(counts)]
        cut = {"index": view.items.index[:, : max(counts)], "token": view.items.token[:, : max(counts)], "mask": mask}
        emptied = dataclasses.replace(view, items=dataclasses.replace(view.items, counts=counts, **cut))
        selection = VQTokenCodebook().select(emptied)
        assert (selection is None) == (counts == (0, 0))
        assert selection is None or [len(each) for each in kept(emptied, selection)] == [0, 5]


@pytest.mark.parametrize("rule", ["official", "corrected"])
def test_the_elbow_chooses(make_view: Any, rule: Any) -> None:
    view = make_view([(6, 8), (5, 5), (1, 2)])
    method = VQTokenCodebook(clusters="elbow", k_min=3, k_max=9, elbow_rule=rule)
    assert not method.needs_budget
    counts, most = method._elbow(view)
    found = (method.select(view).keep & view.items.mask).sum(1)
    assert torch.equal(found, counts)
    assert counts[2] == 2
    low, high = (3, 8) if rule == "official" else (4, 8)
    assert most == high
    assert ((counts[:2] >= low) & (counts[:2] <= high)).all()


@pytest.mark.parametrize("name", ["vqtoken_codebook", "elbow"])
def test_an_item_is_clustered_alike_in_any_batch(make_view: Any, name: str) -> None:
    options = {"clusters": "elbow", "k_min": 2, "k_max": 6} if name == "elbow" else {}
    method = VQTokenCodebook(**options)
    budget = {} if options else {"keep": 5}
    view = make_view([(4, 4), (6, 7)], **budget)
    labels = method.assign(view)[0]
    single = make_view([(4, 4)], **budget)
    hidden = single.hidden.clone()
    hidden[single.items.row[0], single.items.index[0]] = view.tokens[0, :16]
    single = dataclasses.replace(single, states=States(hidden), fingerprint=view.fingerprint[:1])
    assert torch.equal(method.assign(single)[0][0], labels[0, :16])
    other = dataclasses.replace(method, seed=1).assign(view)[0]
    assert not torch.equal(other, labels)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("retention", [0.25, 0.5, 0.8])
def test_achieved_is_what_was_asked_for(name: str, retention: float) -> None:
    for kind in TINY_MODELS[name].kinds:
        model, inputs = tiny_model(name), tiny_inputs(name, [[3, kind, 5], [2, kind, 4]], seed=2)
        with torch.no_grad(), vtc.compress(model, "vqtoken_codebook", retention=retention) as handle:
            model(**inputs)
        call = handle.stats.calls[0]
        for before, after in zip(call.visual_tokens_in, call.visual_tokens_kept, strict=True):
            assert abs(after - retention * before) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": "elbows"}, "unknown clusters 'elbows'; did you mean 'elbow'"),
        ({"empty": "keep"}, "unknown empty 'keep'"),
        ({"elbow_rule": "silhouette"}, "unknown elbow_rule 'silhouette'"),
        ({"k_min": 12, "k_max": 13}, "k_min=12, k_max=13 leave no kink"),
        ({"iterations": 0}, "iterations=0 assigns no token"),
    ],
)
@pytest.mark.parametrize("name", ["vqtoken", "vqtoken_codebook"])
def test_bad_values(name: str, options: Any, message: str) -> None:
    with pytest.raises(VTCError, match=message):
        vtc.create(name, **options)


def test_plans_and_defaults() -> None:
    assert VQTokenCodebook().plan(LLAVA).stages == (0,)
    placed: list[dict[str, Any]] = [
        {},
        {"pooled": False},
        {"order": "place"},
        {"representative": "medoid", "order": "place"},
    ]
    for options in placed:
        found = [VQTokenCodebook(**options).plan(spec).positions for spec in (LLAVA, QWEN)]
        assert found == ["compact", "preserve"], options
    for options in ({"representative": "medoid"}, {"order": "size"}):
        assert VQTokenCodebook(**options).plan(QWEN).positions == "compact", options
    assert VQTokenCodebook().codebook_space == "raw"
    assert not VQTokenCodebook().trained


def test_an_unknown_order() -> None:
    with pytest.raises(UnknownName, match="unknown order 'sized'; did you mean 'size'"):
        vtc.create("vqtoken_codebook", order="sized")
