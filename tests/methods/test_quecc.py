"""QueCC against its equations written as loops, its budgets, its weights, and what a fresh module does."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc import adapters
from vtc.errors import BudgetError, UnsupportedCall, VTCError
from vtc.eval.training import quecc_report
from vtc.eval.training.measure import measure
from vtc.eval.training.settings import TrainingSettings
from vtc.eval.training.trainer import train
from vtc.method import learned, weights
from vtc.method.base import ModelSpec, Rows
from vtc.methods.quecc import QueCC
from vtc.methods.quecc.attention import LOUD, BlockAttention
from vtc.methods.quecc.blocks import blocks
from vtc.testing import TINY_MODELS, check_method, tiny_inputs, tiny_model

HIDDEN, SEEN, DEPTH = 6, 5, 4
"""Widths of the LLM and of the encoder, and encoder layers, of the made-up views."""
SPEC = ModelSpec("llava", DEPTH, DEPTH - 1, True, tuple(range(DEPTH)), 8, width=HIDDEN, vision_width=SEEN)


def quecc(stride: int, **more: Any) -> QueCC:
    return QueCC(stride=stride, width=8, heads=2, training=True, **more)


def filled(method: QueCC, spec: ModelSpec = SPEC) -> BlockAttention:
    """A module that adds something to the means, as training leaves it."""
    torch.manual_seed(1)
    module = method.build(spec)
    assert isinstance(module, BlockAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def seen(make_view: Any, method: QueCC, shapes: Any, module: nn.Module | None = None, **budget: Any) -> Any:
    """The view of such items with what the method reads."""
    generator = torch.Generator().manual_seed(7)
    counts = [each.item().n_tokens if hasattr(each, "item") else math.prod(each) for each in shapes]
    read = {
        (layer, Rows.HIDDEN): [torch.randn(n, SEEN, generator=generator) for n in counts]
        for layer in method.layers(SPEC)
    }
    view = make_view(shapes, vision=read, spec=SPEC, width=HIDDEN, **(budget or {"retention": 1 / method.stride**2}))
    return dataclasses.replace(view, module=filled(method) if module is None else module)


# --- the equations as loops
def linear(x: Tensor, part: nn.Linear) -> Tensor:
    return x @ part.weight.double().T + part.bias.double()


def normed(x: Tensor, part: nn.LayerNorm) -> Tensor:
    spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt() * part.weight.double() + part.bias.double()


def projected(x: Tensor, part: Any) -> Tensor:
    inner = linear(x, part[0])
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return normed(linear(inner, part[2]), part[3])


def attended(module: BlockAttention, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [d] over the tokens of its block [n, d], head by head."""
    inside = module.attention
    matrix, bias = inside.in_proj_weight.double().chunk(3), inside.in_proj_bias.double().chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, keys, values), matrix, bias, strict=True))
    size, parts = len(q) // inside.num_heads, []
    for head in range(inside.num_heads):
        own = slice(head * size, (head + 1) * size)
        parts.append(((k[:, own] @ q[own]) / math.sqrt(size)).softmax(0) @ v[:, own])
    return linear(linear(torch.cat(parts), inside.out_proj), module.out)


def cell(place: int, size: int, cells: int) -> int:
    return (2 * place + 1) * cells // (2 * size)


def plain(module: BlockAttention, view: Any, item: int, rasters: list[tuple[int, int, int, int, int]]) -> Tensor:
    """[G, D] rows of an item; rasters: (frames, rows, columns) and rows and columns of blocks of each frame."""
    question = view.hidden[view.items.row[item]][view.text[view.items.row[item]]].double().mean(0)
    asked = normed(linear(question, module.text_projection[0]), module.text_projection[1])
    tokens = view.tokens[item].double()
    query = projected(tokens + asked, module.q_proj)
    read = torch.cat([view.vision_attention(layer)[item] for layer in (1, 2, 3)], 1).double()
    keys, values = projected(read, module.k_proj), projected(read, module.v_proj)
    kernel, rows, first = module.conv.weight.double(), [], 0
    side = kernel.shape[-1]
    for frames, height, width, down, across in rasters:
        for frame in range(frames):
            begin = first + frame * height * width
            for i in range(down):
                for j in range(across):
                    lines = [r for r in range(height) if cell(r, height, down) == i]
                    columns = [c for c in range(width) if cell(c, width, across) == j]
                    block = [begin + r * width + c for r in lines for c in columns]
                    taken = torch.stack([
                        query[begin + lines[(2 * a + 1) * len(lines) // (2 * side)] * width
                              + columns[(2 * b + 1) * len(columns) // (2 * side)]]
                        for a in range(side) for b in range(side)
                    ])  # fmt: skip
                    q = (taken * kernel.flatten(1).T).sum(0) + module.conv.bias.double()
                    rows.append(tokens[block].mean(0) + attended(module, q, keys[block], values[block]))
        first += frames * height * width
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 3])
def test_against_the_equations(make_view: Any, shape: Any, video: Any, limits: Any, stride: int) -> None:
    """Sides that the stride divides, others, a clip, and two rasters with newlines; all in one batch."""
    items = [(6, 6), (5, 7), video(2, 6, 4), shape(((1, 6, 6), (1, 6, 5)), newlines=True)]
    laid = {
        2: [[(1, 6, 6, 3, 3)], [(1, 5, 7, 3, 3)], [(2, 6, 4, 3, 2)], [(1, 6, 6, 3, 2), (1, 6, 5, 2, 2)]],
        3: [[(1, 6, 6, 2, 2)], [(1, 5, 7, 2, 2)], [(2, 6, 4, 2, 1)], [(1, 6, 6, 1, 1), (1, 6, 5, 1, 1)]],
    }
    method = quecc(stride)
    view = seen(make_view, method, items)
    selection = method.select(view)
    for item, rasters in enumerate(laid[stride]):
        expected = plain(view.module, view, item, rasters)
        found = selection.tokens[item, selection.keep[item]]
        assert selection.counts[item] == len(expected) == len(found)
        assert torch.allclose(found.double(), expected, atol=limits.hidden)


@torch.no_grad()
def test_the_kernel_is_a_convolution_where_the_stride_divides(make_view: Any) -> None:
    method = quecc(3)
    view = seen(make_view, method, [(6, 9)])
    module, found = view.module, blocks(((1, 6, 9),), 6, 3)
    query = torch.randn(54, 8)
    taken = query[found.taps]
    ours = (taken * module.conv.weight.flatten(1).T).sum(1) + module.conv.bias
    map_ = module.conv(query.T.reshape(1, 8, 6, 9))
    assert torch.allclose(ours, map_[0].flatten(1).T, atol=1e-6)


# --- what a fresh module does, and where blocks lie
@torch.no_grad()
@pytest.mark.parametrize("shapes", [[(6, 6), (4, 8)], [(12, 12)]])
def test_a_fresh_module_pools(make_view: Any, shapes: Any) -> None:
    method = quecc(2)
    view = seen(make_view, method, shapes, method.build(SPEC))
    ours, pooled = method.select(view), vtc.create("pool").select(view)
    assert pooled.tokens is not None and ours.tokens is not None
    assert torch.equal(ours.keep, pooled.keep) and list(ours.counts or ()) == list(pooled.counts or ())
    assert torch.allclose(ours.tokens[ours.keep], pooled.tokens[pooled.keep], atol=1e-6)
    assert torch.equal(ours.merged_into, pooled.merged_into)


@torch.no_grad()
def test_a_fresh_module_tells_questions_apart() -> None:
    """Means of embedded texts are short, so that a bias beside them would make all questions the same."""
    texts = 0.02 * torch.randn(64, 128)
    made = BlockAttention(128, 24, 16, 2, 3).text_projection(texts)
    near = torch.cosine_similarity(made[:, None], made[None], dim=-1)
    assert float((near - torch.eye(64)).abs().mean()) < 0.2
    assert float(made.square().mean().sqrt()) == pytest.approx(LOUD, rel=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 3, 4])
def test_as_many_tokens_as_pooling_keeps(make_view: Any, shape: Any, video: Any, kept: Any, stride: int) -> None:
    """Retention means the same: on rasters of any sides, clips and with newlines, what is kept is what pool keeps."""
    items = [(7, 5), (1, 9), video(3, 5, 4), video(40, 1, 1), shape(((1, 5, 5), (1, 7, 9)), newlines=True), (24, 24)]
    method = quecc(stride)
    view = seen(make_view, method, items)
    ours, pooled = method.select(view), vtc.create("pool").select(view)
    assert kept(view, ours) == kept(view, pooled)
    assert torch.equal(ours.merged_into, pooled.merged_into)


@torch.no_grad()
def test_a_query_sees_its_own_block_alone(make_view: Any) -> None:
    method = quecc(2)
    view = seen(make_view, method, [(6, 6)])
    before = method.select(view)
    token, layer = 8, method.layers(SPEC)[0]  # row 1, column 2: block 1
    changed = dict(view.vision_rows)
    changed[layer, Rows.HIDDEN] = changed[layer, Rows.HIDDEN].clone()
    changed[layer, Rows.HIDDEN][0, token] += 3
    after = method.select(dataclasses.replace(view, vision_rows=changed))
    rows = [each.tokens[0, each.keep[0]] for each in (before, after)]
    moved = (rows[0] - rows[1]).abs().amax(1) > 1e-6
    assert moved.tolist() == [block == 1 for block in range(9)]


@torch.no_grad()
def test_the_question_changes_every_row() -> None:
    model = tiny_model("llava-clip")
    spec = adapters.of(model).spec
    method = quecc(2)
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]], model=model)
    found = []
    for change in (0, 1):
        given = {**inputs, "input_ids": inputs["input_ids"].clone()}
        given["input_ids"][0, -1] += change
        with vtc.compress(model, method, retention=0.25, positions="compact") as handle:
            handle.module.load_state_dict(filled(method, spec).state_dict())  # type: ignore[union-attr]
            found.append(model(**given, output_hidden_states=True).hidden_states[0][0, 3:7])
    assert float((found[0] - found[1]).abs().amax(1).min()) > 1e-4


# --- budgets
def test_other_budgets_are_refused_by_name(make_view: Any) -> None:
    method = quecc(2)
    with pytest.raises(BudgetError, match=r"one token of 2 x 2, and the budget grants 18 of 36; ask for retention=0.25 "
                       r"\(keep=9\), or train weights for 0.1111 \(stride=3\), 0.0625 \(stride=4\)"):  # fmt: skip
        method.select(seen(make_view, method, [(6, 6)], retention=0.5))
    with pytest.raises(BudgetError, match="grants 10 of 36"):
        method.select(seen(make_view, method, [(6, 6)], keep=10))
    assert method.select(seen(make_view, method, [(6, 6)], keep=9)).counts == [9]
    assert quecc(3).select(seen(make_view, quecc(3), [(12, 12)], retention=0.111)).counts == [16]


@torch.no_grad()
def test_an_item_below_the_budget_stays_as_it_is(make_view: Any, kept: Any) -> None:
    method = quecc(2)
    view = seen(make_view, method, [(4, 4), (1, 2), (2, 2)], keep=4)
    selection = method.select(view)
    assert [len(each) for each in kept(view, selection)] == [4, 2, 4]
    for item in (1, 2):
        assert torch.equal(selection.tokens[item, view.items.mask[item]], view.tokens[item, view.items.mask[item]])
    assert not bool((selection.tokens[0] == view.tokens[0])[selection.keep[0]].any())


def test_items_that_are_no_rasters_are_refused(make_view: Any) -> None:
    method = quecc(2)
    view = seen(make_view, method, [(6, 6)])
    torn = dataclasses.replace(view.items, counts=(30,))
    with pytest.raises(UnsupportedCall, match="full rasters, this image has 30 of 36 in 1 rasters; choose another"):
        method.select(dataclasses.replace(view, items=torn, budget=vtc.method.budget.Budget(keep=9)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stride": 1}, "stride=1 makes no block of several tokens; write 2 or more"),
        ({"width": 30}, "width=30 cannot be split over heads=8; write for example width=1024, heads=8"),
        ({"heads": 0}, "width=1024 cannot be split over heads=0"),
    ],
)
def test_settings_that_make_no_module(given: dict[str, int], message: str) -> None:
    with pytest.raises(VTCError, match=message):
        QueCC(**given)  # type: ignore[arg-type]


# --- weights and training
def test_layers_follow_the_encoder() -> None:
    clip = next(iter(vtc.adapters.families()["llava"].references))
    assert QueCC().layers(clip) == (11, 15, 21, 22)
    assert QueCC().layers(SPEC) == (1, 2, 3)
    assert QueCC().layers(dataclasses.replace(SPEC, vision_layers=2, feature_layer=0)) == (0,)


def stored(folder: Path, name: str, stride: int = 2) -> QueCC:
    """The method with weights that add something, for a tiny model."""
    method, spec = quecc(stride), adapters.of(tiny_model(name)).spec
    path = method.save(folder / f"{name}.safetensors", filled(method, spec), spec)
    return dataclasses.replace(method, training=False, weights=str(path))


def test_weights_are_stored_by_half_and_checked(tmp_path: Path) -> None:
    method, spec = stored(tmp_path, "llava-clip"), adapters.of(tiny_model("llava-clip")).spec
    tensors, about = weights.read(str(method.weights))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert (about["stride"], about["layers"]) == ("2", ",".join(map(str, method.layers(spec))))
    assert {each.dtype for each in method.module(spec).parameters()} == {torch.float32}
    assert learned.load(str(method.weights)) == method
    with pytest.raises(VTCError, match="were made with stride='2', this run has stride='3'"):
        dataclasses.replace(method, stride=3).module(spec)
    with pytest.raises(VTCError, match="'quecc' runs on learned weights and none were given"):
        vtc.compress(tiny_model("llava-clip"), QueCC(), retention=0.0625)
    with pytest.raises(VTCError, match=r"they belong to another model: train them anew"):
        method.module(dataclasses.replace(spec, vision_width=spec.vision_width + 1))


def test_gradients_reach_every_parameter() -> None:
    """A fresh module learns its last layer first, which is zero; from then on all of it."""
    method, model = quecc(2), tiny_model("llava-clip").requires_grad_(False)
    inputs = tiny_inputs("llava-clip", [[3, "image", 5], [2, "image", 4]], model=model)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with vtc.compress(model, method, retention=0.25, pad_output=True) as handle:
        module = handle.module
        assert module is not None
        model(**inputs, labels=labels).loss.backward()
        moved = {name for name, each in module.named_parameters() if each.grad is not None and bool(each.grad.any())}
        assert moved == {"out.weight", "out.bias"}
        torch.optim.SGD(module.parameters(), 0.5).step()
        model(**inputs, labels=labels).loss.backward()
    still = {name for name, each in module.named_parameters() if not bool(each.grad.any())}
    assert not still


def test_it_is_trained_by_the_command_s_loop(tmp_path: Path) -> None:
    parameters = {"stride": 3, "width": 16, "heads": 2}
    settings = TrainingSettings("quecc", parameters, retention=1 / 9, steps=2, batch_size=2, scenes=4, warmup=1)
    path = train(tmp_path, settings, device="cpu", check_every=0, per_family=0)
    method = learned.load(path)
    assert isinstance(method, QueCC) and (method.stride, method.width) == (3, 16)
    assert bool(weights.read(path)[0]["out.weight"].any())


# --- on models
@pytest.mark.parametrize("name", TINY_MODELS)
def test_it_runs_on_every_family(tmp_path: Path, name: str) -> None:
    method = stored(tmp_path, name)
    for kind in TINY_MODELS[name].kinds:
        model, inputs = tiny_model(name), tiny_inputs(name, [[3, kind, 5], [2, kind, 4]], seed=2)
        with torch.no_grad(), vtc.compress(model, method, retention=0.25) as handle:
            model(**inputs)
        with torch.no_grad(), vtc.compress(model, "pool", retention=0.25) as pooled:
            model(**inputs)
        assert handle.stats.calls[0].visual_tokens_kept == pooled.stats.calls[0].visual_tokens_kept


@pytest.mark.parametrize("name", ["llava-next", "qwen2.5-vl"])
def test_the_contract_of_weights_that_add_something(tmp_path: Path, name: str) -> None:
    """The contract over all methods runs fresh weights, whose attention changes nothing."""
    check_method(stored(tmp_path, name), models=[name], retention=0.25, policies=["preserve"], generation=("greedy",),
                 steps=2)  # fmt: skip


# --- the embedded weights
@pytest.mark.parametrize("name", quecc_report.WEIGHTS)
def test_embedded_weights_load_by_name(name: str) -> None:
    method = learned.load(name)
    assert isinstance(method, QueCC) and method.weights == name
    assert weights.find(name).stat().st_size < 300_000


def test_training_and_the_question_pay_on_scenes_never_seen() -> None:
    """Right answers of 180 at sixteen tokens."""

    def right(method: Any) -> int:
        return sum(measure(quecc_report.MODEL, method, 1 / 9, 20, split="benchmark", first_seed=0).right)

    trained = learned.load(quecc_report.WEIGHTS[0])
    given = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
    found = right(trained)
    assert found >= right(vtc.create("pool")) + 15
    assert found >= right(quecc_report.AnotherQuestion(**given)) + 4


def test_the_page_holds_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quecc_report, "WEIGHTS", quecc_report.WEIGHTS[:1])
    quecc_report.main(["--out", str(tmp_path / "page.md"), "--per-family", "1"])
    text = (tmp_path / "page.md").read_text()
    assert all(f"| {form} | " in text for form in (*quecc_report.FORMS, "untouched"))
    assert "3 x 3 tokens become one, 16 of 144" in text and "600 updates of 16 questions, then 400" in text
    first, second = (f"vtc train --method quecc --out runs/{folder} " for folder in ("quecc-6", "quecc"))
    assert text.index(first) < text.index(second) < text.index("--start runs/quecc-6/weights.safetensors")
