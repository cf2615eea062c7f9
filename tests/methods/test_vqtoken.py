"""VQToken against the card's steps, one item, one token at a time; the attention block; weights; budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import vtc
from vtc import adapters, weights
from vtc.compressor import ModelSpec
from vtc.errors import BudgetError, UnknownName, UnsupportedMethod, VTCError
from vtc.methods.vqtoken import OFFICIAL_PREFIX, VQToken, VQTokenCodebook, _raster
from vtc.ops import cluster
from vtc.ops.vq_attention import VQAttention
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
        "from vtc.ops import cluster\n"
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
    view = dataclasses.replace(view, hidden=torch.ones_like(view.hidden))
    assert ((VQTokenCodebook().select(view).keep & view.items.mask).sum(1) == 7).all()
    dropped = VQTokenCodebook(empty="drop").select(view)
    assert dropped.counts is None
    assert ((dropped.keep & view.items.mask).sum(1) == 1).all()


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
    single = dataclasses.replace(single, hidden=hidden, fingerprint=view.fingerprint[:1])
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


def test_plans() -> None:
    for method in (VQTokenCodebook(), VQToken()):
        assert [method.plan(spec).positions for spec in (LLAVA, QWEN)] == ["compact", "compact"]
        assert method.plan(LLAVA).stages == (0,)
    placed = VQTokenCodebook(representative="medoid", order="place")
    assert [placed.plan(spec).positions for spec in (LLAVA, QWEN)] == ["compact", "preserve"]


def test_published_defaults() -> None:
    method = VQToken()
    assert (method.k_min, method.k_max, method.tolerance, method.elbow_rule) == (12, 32, 1e-4, "official")
    assert (method.heads, method.inner, method.dropout, method.places) == (8, 2048, 0.1, 729)
    assert (method.codebook_space, VQTokenCodebook().codebook_space) == ("normalized", "raw")
    assert method.trained and not VQTokenCodebook().trained
    spec = dataclasses.replace(LLAVA, width=896)
    assert sum(p.numel() for p in method.build(spec).parameters()) == 10_762_112


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


def test_more_bad_values() -> None:
    with pytest.raises(UnknownName, match="unknown order 'sized'; did you mean 'size'"):
        vtc.create("vqtoken_codebook", order="sized")
    with pytest.raises(UnknownName, match="unknown queries 'row'"):
        vtc.create("vqtoken", queries="row")
    with pytest.raises(VTCError, match=r"grid=\(12, 0\).* describe no attention block"):
        vtc.create("vqtoken", grid=[12, 0])
    with pytest.raises(UnsupportedMethod, match="heads=7 does not divide the width 4096"):
        vtc.create("vqtoken", heads=7).plan(LLAVA)


# --- the attention block
def attend(weights: dict[str, Tensor], name: str, query: Tensor, memory: Tensor, heads: int) -> Tensor:
    """Multi-head attention of [Q, D] queries over [M, D] memory, one head and one query at a time."""
    width = query.shape[1]
    size = width // heads
    parts = zip(
        weights[f"{name}.in_proj_weight"].split(width), weights[f"{name}.in_proj_bias"].split(width), strict=True
    )
    q, k, v = (x @ w.T + b for x, (w, b) in zip((query, memory, memory), parts, strict=True))
    out = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(query)):
            shares = torch.stack([q[row, part] @ other / math.sqrt(size) for other in k[:, part]]).softmax(0)
            out[row, part] = sum(share * value for share, value in zip(shares, v[:, part], strict=True))
    return out @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]


def plain_block(block: VQAttention, index_map: Tensor, codes: Tensor, heads: int, residual: bool = False) -> Tensor:
    """Steps E1 to E3 for one item: [T, places] numbers and [K, D] codes."""
    whole = {name: value.double() for name, value in block.state_dict().items()}
    layer = {k.removeprefix("transformer_decoder.layers.0."): v for k, v in whole.items()}

    def norm(x: Tensor, which: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
        return scaled * layer[f"{which}.weight"] + layer[f"{which}.bias"]

    length = max(len(index_map), len(codes))
    lines = index_map.double() @ whole["to_q_proj.weight"].T + whole["to_q_proj.bias"]
    memory = torch.stack([codes[j % len(codes)].double() for j in range(length)])
    query = torch.stack([lines[j % len(lines)] for j in range(length)]) + (memory if residual else 0)
    y1 = norm(query + attend(layer, "self_attn", query, query, heads), "norm1")
    y2 = norm(y1 + attend(layer, "multihead_attn", y1, memory, heads), "norm2")
    inner = torch.relu(y2 @ layer["linear1.weight"].T + layer["linear1.bias"])
    out = norm(y2 + inner @ layer["linear2.weight"].T + layer["linear2.bias"], "norm3")
    return out + memory if residual else out


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_the_plain_block(residual: bool, limits: Any) -> None:
    """Items of different size side by side; more codes than rows and the other way round."""
    torch.manual_seed(0)
    block = VQAttention(6, 8, heads=2, inner=12).eval()
    for parameter in block.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    rows, sizes = [1, 5, 3, 4], [7, 2, 3, 6]
    index_map, codes = torch.randint(7, (4, 5, 6)).float(), torch.randn(4, 7, 8)
    found = block(index_map, codes, torch.tensor(rows), torch.tensor(sizes), residual=residual)
    for item, (t, k) in enumerate(zip(rows, sizes, strict=True)):
        expected = plain_block(block, index_map[item, :t], codes[item, :k], 2, residual)
        assert torch.allclose(found[item, : max(t, k)].double(), expected, atol=limits.hidden)
        if not residual:
            distinct = {tuple(row) for row in found[item, : max(t, k)].round(decimals=4).tolist()}
            assert len(distinct) <= t


def test_a_fresh_block() -> None:
    """Matrices without the official quirk: gains of 1. A residual block begins as the codebook itself."""
    torch.manual_seed(0)
    spec = dataclasses.replace(LLAVA, width=16)
    names = {name.removeprefix("vq_attn.") for name in VQToken(heads=2).build(spec).state_dict()}
    golden = {f"transformer_decoder.layers.0.{part}" for part in ("norm3.weight", "self_attn.in_proj_weight")}
    assert names > golden | {"to_q_proj.weight", "to_q_proj.bias"}
    assert len(names) == 20
    layer = VQToken(heads=2).build(spec)["vq_attn"].transformer_decoder.layers[0]  # type: ignore[index,union-attr]
    assert bool((layer.norm3.weight == 1).all())
    block = VQToken(heads=2, residual=True, grid=(2, 2)).build(spec)["vq_attn"]  # type: ignore[index]
    codes = torch.randn(1, 5, 16)
    assert torch.equal(block(torch.zeros(1, 1, 4), codes, residual=True), codes)


def test_the_map_of_rasters() -> None:
    assert _raster(((2, 3, 4),), (3, 4)).tolist() == list(range(24))
    assert _raster(((1, 4, 4),), (2, 2)).tolist() == [5, 7, 13, 15]
    assert _raster(((1, 2, 2), (1, 2, 4)), (2, 2)).tolist() == [0, 1, 2, 3, 5, 7, 9, 11]
    assert _raster(((1, 2, 2),), (4, 4)).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


# --- the method with its block
TINY = {"grid": (4, 4), "heads": 4, "inner": 24}


def stored(tmp_path: Path, name: str = "llava-clip", **options: Any) -> VQToken:
    """The method with weights written from a fresh block."""
    torch.manual_seed(0)
    method = VQToken(training=True, **{**TINY, **options})
    spec = adapters.of(tiny_model(name)).spec
    module = method.module(spec)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    path = method.save(tmp_path / "w.safetensors", module, spec)
    return dataclasses.replace(method, weights=str(path), training=False)


def first_rows(model: Any, method: VQToken, inputs: Any, **budget: Any) -> tuple[Tensor, vtc.Handle]:
    """Rows entering the first LLM layer."""
    seen: list[Tensor] = []
    layer = adapters.of(model).layers[0]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), vtc.compress(model, method, **budget) as handle:
        model(**inputs)
    hook.remove()
    return seen[0], handle


@pytest.mark.parametrize("options", [{}, {"queries": "line"}, {"residual": True}, {"canonical_ids": True}], ids=str)
@pytest.mark.parametrize("keep", [4, 9, 15])
def test_the_llm_gets_the_rows_of_the_block(tmp_path: Path, options: Any, keep: int, limits: Any) -> None:
    method, model = stored(tmp_path, **options), tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    rows, handle = first_rows(model, method, inputs, keep=keep)
    with torch.no_grad():
        tokens = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0][None]
    mask, counts = torch.ones(1, 16, dtype=torch.bool), torch.tensor([[keep]])
    key = vtc.ops.hashing.fingerprint(inputs["pixel_values"])
    views: list[Any] = []
    with torch.no_grad(), vtc.compress(model, _Spy(views), keep=keep):
        model(**inputs)
    key = views[0].fingerprint
    start = plain.seed_centres(tokens, counts, keep, key, torch.arange(16)[None], mask)
    labels = plain.split_empty(tokens, plain.kmeans(tokens, start, counts, mask).labels[:, 0], counts[0], keep, mask)
    if method.canonical_ids:
        labels = plain.relabel(labels, plain.ordering(plain.describe(labels, keep, mask)))
    codes, _ = plain.codebook(tokens, labels, keep, mask, normalized=True)
    block = handle.module["vq_attn"]  # type: ignore[index]
    lines = labels.view(-1, 4 if method.queries == "line" else 16)
    expected = plain_block(block, lines, codes[0], 4, method.residual)
    assert rows.shape[1] == 8 + keep
    assert torch.allclose(rows[0, 3 : 3 + keep].double(), expected, atol=limits.hidden)
    if not (method.residual or method.queries == "line"):
        assert torch.allclose(rows[0, 3 : 3 + keep], rows[0, 3:4].expand(keep, -1), atol=limits.hidden)


@dataclasses.dataclass(frozen=True)
class _Spy(VQTokenCodebook):
    """Leaves the view of its stage behind."""

    views: list[Any] = dataclasses.field(default_factory=list, compare=False)

    def __init__(self, views: list[Any]) -> None:
        super().__init__()
        object.__setattr__(self, "views", views)

    def select(self, view: Any) -> Any:
        self.views.append(view)
        return super().select(view)


def test_budgets_below_the_queries_are_refused(tmp_path: Path) -> None:
    method, model = stored(tmp_path, queries="line"), tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    with pytest.raises(BudgetError, match=r"4 for this image, and the budget grants 3; ask for at least keep=4 \(ret"):
        first_rows(model, method, inputs, keep=3)
    elbow = dataclasses.replace(method, clusters="elbow", k_min=2, k_max=4, elbow_rule="corrected")
    rows, handle = first_rows(model, elbow, inputs)
    assert handle.stats.calls[0].visual_tokens_kept == (4.0,)  # max(queries, K) with K = 3
    assert rows.shape[1] == 8 + 4


def test_other_rasters(tmp_path: Path) -> None:
    method = stored(tmp_path, grid=(3, 5))
    model, inputs = tiny_model("llava-clip"), tiny_inputs("llava-clip", [[3, "image", 5]])
    with pytest.raises(UnsupportedMethod, match="reads maps of 3x5 tokens, this image has 1x4x4; pass resample=True"):
        first_rows(model, method, inputs, keep=6)
    rows, _ = first_rows(model, dataclasses.replace(method, resample=True), inputs, keep=6)
    assert rows.shape[1] == 8 + 6


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_block_runs_on_every_family(tmp_path: Path, name: str) -> None:
    method = stored(tmp_path, name, resample=True)
    for kind in TINY_MODELS[name].kinds:
        model, inputs = tiny_model(name), tiny_inputs(name, [[3, kind, 5], [2, kind, 4]], seed=2)
        with torch.no_grad(), vtc.compress(model, method, retention=0.5) as handle:
            model(**inputs)
        call = handle.stats.calls[0]
        for before, after in zip(call.visual_tokens_in, call.visual_tokens_kept, strict=True):
            assert abs(after - 0.5 * before) <= 1


def test_ablations_and_seeds_change_the_rows(tmp_path: Path) -> None:
    method, model = stored(tmp_path, queries="line"), tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    changes: Sequence[dict[str, Any]] = (
        {},
        {"ablation": "random_map"},
        {"ablation": "random_codebook"},
        {"seed": 1},
        {"ablation": "random_map", "seed": 1},
    )
    rows = [first_rows(model, dataclasses.replace(method, **change), inputs, keep=6)[0] for change in changes]
    again = first_rows(model, dataclasses.replace(method, **changes[1]), inputs, keep=6)[0]
    assert torch.equal(rows[1], again)
    for first in range(len(rows)):
        assert all(float((rows[first] - other).abs().max()) > 1e-3 for other in rows[first + 1 :])


def test_canonical_numbers_do_not_depend_on_the_order_of_the_draws(make_view: Any) -> None:
    view = make_view([(4, 4)], keep=5)
    labels, _, most = VQTokenCodebook().assign(view)
    permuted = torch.randperm(most)[labels]
    ranks = [
        cluster.relabel(x, cluster.ordering(cluster.describe(x, most, view.items.mask))) for x in (labels, permuted)
    ]
    assert torch.equal(*ranks)


def test_weights_of_the_authors_are_understood(tmp_path: Path) -> None:
    method = stored(tmp_path)
    spec = adapters.of(tiny_model("llava-clip")).spec
    tensors, metadata = weights.read(str(method.weights))
    assert metadata["method"] == "vqtoken"
    assert (metadata["query_dim"], metadata["context_dim"], metadata["num_heads"]) == ("16", str(spec.width), "4")
    assert {"dim_feedforward", "codebook_space", "elbow_mode", "base_model"} <= set(metadata)
    assert all(name.startswith("vq_attn.") for name in tensors)
    renamed = {name.replace("vq_attn.", OFFICIAL_PREFIX): tensor.bfloat16() for name, tensor in tensors.items()}
    renamed["model.layers.0.mlp.weight"] = torch.zeros(2)
    path = weights.save(tmp_path / "official.safetensors", renamed, {})
    module = dataclasses.replace(method, weights=str(path)).module(spec)
    for name, value in module.state_dict().items():
        assert torch.equal(value, tensors[name].bfloat16().float())
    with pytest.raises(VTCError, match=r"'vq_attn.to_q_proj.weight' of shape \(\d+, 16\), \(\d+, 9\) is needed"):
        dataclasses.replace(method, weights=str(path), grid=(3, 3)).module(spec)
    with pytest.raises(VTCError, match="made with residual='false', this run has residual='true'"):
        dataclasses.replace(method, residual=True).module(spec)
    with pytest.raises(VTCError, match="runs on learned weights and none were given"):
        dataclasses.replace(method, weights=None).module(spec)


def test_gradients_reach_every_parameter_of_the_block(tmp_path: Path) -> None:
    method = dataclasses.replace(stored(tmp_path, queries="line", dropout=0.0), training=True)
    model, inputs = tiny_model("llava-clip").requires_grad_(False), tiny_inputs("llava-clip", [[3, "image", 5]])
    with vtc.compress(model, method, keep=6, pad_output=True) as handle:
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        model(**inputs, labels=labels).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in handle.module.parameters())  # type: ignore[union-attr]
