"""VQToken's attention block one head and one query at a time; what reaches the LLM; weights; budgets."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import BudgetError, UnknownName, UnsupportedMethod, VTCError
from vtc.method import weights
from vtc.method.base import ModelSpec
from vtc.methods.vqtoken import cluster
from vtc.methods.vqtoken.attention import VQAttention
from vtc.methods.vqtoken.codebook import VQTokenCodebook
from vtc.methods.vqtoken.method import OFFICIAL_PREFIX, VQToken, _raster, occupancy
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.plain import cluster as plain

LLAVA = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32, single_crop=True, width=4096)
QWEN = ModelSpec("qwen2_5_vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True, width=3584)


def test_plans_and_published_defaults() -> None:
    method = VQToken()
    assert [method.plan(spec).positions for spec in (LLAVA, QWEN)] == ["compact", "compact"]
    assert method.plan(LLAVA).stages == (0,)
    assert (method.k_min, method.k_max, method.tolerance, method.elbow_rule) == (12, 32, 1e-4, "official")
    assert (method.heads, method.inner, method.dropout, method.places) == (8, 2048, 0.1, 729)
    assert method.codebook_space == "normalized"
    assert method.trained
    spec = dataclasses.replace(LLAVA, width=896)
    assert sum(p.numel() for p in method.build(spec).parameters()) == 10_762_112


def test_bad_values() -> None:
    with pytest.raises(UnknownName, match="unknown queries 'row'"):
        vtc.create("vqtoken", queries="row")
    with pytest.raises(
        VTCError, match="residual='true' of 'vqtoken' is not True or False; write for example residual=F"
    ):
        vtc.create("vqtoken", residual="true")
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
ELBOW: dict[str, Any] = {"clusters": "elbow", "k_min": 2, "k_max": 4}
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


@pytest.mark.parametrize(
    "options",
    [{}, {"queries": "line"}, {"residual": True}, {"canonical_ids": True}, {"queries": "cluster", "residual": True}],
    ids=str,
)
@pytest.mark.parametrize("keep", [4, 9, 15])
def test_the_llm_gets_the_rows_of_the_block(tmp_path: Path, options: Any, keep: int, limits: Any) -> None:
    method, model = stored(tmp_path, **options), tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    rows, handle = first_rows(model, method, inputs, keep=keep)
    with torch.no_grad():
        tokens = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0][None]
    mask, counts = torch.ones(1, 16, dtype=torch.bool), torch.tensor([[keep]])
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
    if method.queries == "cluster":
        lines = torch.tensor([[int(label == k) for label in labels[0].tolist()] for k in range(keep)])
    expected = plain_block(block, lines, codes[0], 4, method.residual)
    assert rows.shape[1] == 8 + keep
    assert torch.allclose(rows[0, 3 : 3 + keep].double(), expected, atol=limits.hidden)
    if not method.residual and method.queries == "frame":
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


def test_what_is_kept_of_a_raster_may_meet_a_training() -> None:
    _raster.cache_clear()
    with torch.inference_mode():
        assert not _raster(((2, 3, 4),), (2, 2)).is_inference()


def test_budgets_below_the_queries_are_refused(tmp_path: Path) -> None:
    method, model = stored(tmp_path, queries="line"), tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    with pytest.raises(BudgetError, match=r"4 for this image, and the budget grants 3; ask for at least keep=4 \(ret"):
        first_rows(model, method, inputs, keep=3)
    many = stored(tmp_path, queries="line", grid=(20, 4), resample=True)
    with pytest.raises(BudgetError, match="20 for this image, and it has 16; use queries='cluster'"):
        first_rows(model, dataclasses.replace(many, **ELBOW), inputs)
    elbow = dataclasses.replace(stored(tmp_path, queries="line"), **{**ELBOW, "elbow_rule": "corrected"})
    rows, handle = first_rows(model, elbow, inputs)
    assert handle.stats.calls[0].visual_tokens_kept == (4.0,)  # max(queries, K) with K = 3
    assert rows.shape[1] == 8 + 4


def test_one_query_per_cluster_fits_any_budget(tmp_path: Path) -> None:
    method, model = stored(tmp_path, queries="cluster"), tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    for keep in (1, 2, 15):
        rows, _ = first_rows(model, method, inputs, keep=keep)
        assert rows.shape[1] == 8 + keep


def test_occupancy() -> None:
    numbers = torch.tensor([[[0, 1, 1], [0, 0, 2]], [[2, 2, 0], [1, 1, 1]]])
    found = occupancy(numbers, torch.tensor([2, 1]), 3)
    assert found[0].tolist() == [[1.0, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.5]]
    assert found[1].tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


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


@pytest.mark.parametrize("queries", ["frame", "line", "cluster"])
def test_an_item_below_the_budget_stays_as_it_is(make_view: Any, kept: Any, queries: Any) -> None:
    """Alone it would not reach the method, so it must not change in a batch either."""
    view = make_view([(4, 4), (1, 2), (2, 3)], keep=6)
    method = VQToken(training=True, grid=(4, 4), heads=2, inner=8, queries=queries, resample=True)
    module = method.build(dataclasses.replace(LLAVA, width=6)).eval()
    selection = method.select(dataclasses.replace(view, module=module))
    assert [len(each) for each in kept(view, selection)] == [6, 2, 6]
    assert selection.tokens is not None
    for item in (1, 2):
        assert torch.equal(selection.tokens[item, view.items.mask[item]], view.tokens[item, view.items.mask[item]])
    assert not bool((selection.tokens[0] == view.tokens[0]).any())


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


# --- the embedded weights
def test_training_pays_on_scenes_never_seen(tmp_path: Path) -> None:
    """Right answers of 360 at twelve tokens: trained 329, codes alone 306, a random residual block 312, plain 31."""
    report = importlib.import_module("vtc.eval.training.vqtoken_report")

    def right(method: Any) -> int:
        return sum(report.measure(report.MODEL, method, 12 / 144, 40, split="benchmark", first_seed=0).right)

    trained = right(report.trained(report.EMBEDDED))
    assert trained >= right(vtc.create("vqtoken_codebook")) + 8
    assert trained >= right(report.untrained(report.EMBEDDED, tmp_path)) + 5
    assert trained >= right(report.untrained(report.EMBEDDED, tmp_path, residual=False)) + 200


def test_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = importlib.import_module("vtc.eval.training.vqtoken_report")
    monkeypatch.setattr(report, "BUDGETS", (12,))
    report.main(["--out", str(tmp_path / "page.md"), "--per-family", "1", "--plain", report.EMBEDDED])
    text = (tmp_path / "page.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "method" not in line]
    assert len(lines) == 6
    assert all(line.count("|") == 13 for line in lines)
    command = "vtc train --method vqtoken --out runs/vqtoken --batch-size 32 --rate 0.002 --retention 0.083333"
    assert text.count(command) == 2
