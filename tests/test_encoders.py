"""Encoders without an LLM, against plain loops over an image, its blocks and its tokens, written from the equations."""

from __future__ import annotations

import copy
import doctest
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import pytest
import torch
import transformers
from torch import Tensor

import vtc
from vtc.engine import taps
from vtc.errors import UnsupportedCall, UnsupportedMethod, UnsupportedModel, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.ops.select import top_k
from vtc.testing.encoders import (
    BLOCKS,
    NAMES,
    OPEN,
    OPEN_TEXT,
    PATCHES,
    POOLED,
    PREFIX,
    VISION,
    blocks,
    build,
    embed,
    encode,
    one_block,
    pixels,
    pool,
)

LIMIT = 5e-5
METHODS: dict[str, Compressor] = {
    "tome": vtc.create("tome", inside=True),
    "tome, keys count one": vtc.create("tome", inside=True, proportional=False),
    "pitome": vtc.create("pitome", inside=True),
    "pitome, as for CLIP": vtc.create("pitome", inside=True, metric="features", weighted=False, proportional=False),
}

INSIDE = ("diffrate", "expediting_vit", "pixelprune", "token_transforming", "zero_tprune")
"""Methods of encoders alone; tests/methods compare them with loops of their own."""


# --- the plain loops
@dataclass
class Group:
    """A token: the patches in it, the one whose place it has, its row and what it is compared by."""

    patches: list[int]
    place: int
    row: Tensor
    metric: Tensor

    @property
    def size(self) -> int:
        return len(self.patches)


def cosine(a: Group, b: Group) -> float:
    return float(torch.nn.functional.cosine_similarity(a.metric.double(), b.metric.double(), dim=0))


def joined(target: Group, sources: list[Group], weighted: bool) -> Group:
    parts = [*sources, target]
    weights = [part.size if weighted else 1 for part in parts]
    mean = [
        sum(w * getattr(p, name) for w, p in zip(weights, parts, strict=True)) / sum(weights)
        for name in ("row", "metric")
    ]
    return Group([n for part in parts for n in part.patches], target.place, *mean)


def tome_step(tokens: list[Group], r: int, has_cls: bool) -> list[Group]:
    """A and B alternate, the class token first in A; the r best edges merge; unmerged A, then B, as released."""
    a, b = (tokens[1::2], tokens[0::2]) if has_cls else (tokens[0::2], tokens[1::2])
    edges = []
    for place, token in enumerate(a):
        best = max(range(len(b)), key=lambda n, token=token: (cosine(token, b[n]), -n))
        edges.append((cosine(token, b[best]), place, best))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    rest = edges[r:] if not has_cls else sorted(edges[r:], key=lambda edge: edge[1])
    merged = [joined(each, [a[p] for _, p, n in edges[:r] if n == number], True) for number, each in enumerate(b)]
    return [a[place] for _, place, _ in rest] + merged


def pitome_step(tokens: list[Group], r: int, margin: float, weighted: bool) -> list[Group]:
    """The 2 r tokens of highest energy may merge: even ranks join the odd rank most like them."""

    def elu(x: float) -> float:
        return x if x > 0 else math.exp(x) - 1

    energy = [sum(elu(cosine(a, b) - margin) for b in tokens) / len(tokens) for a in tokens]
    ranks = sorted(range(len(tokens)), key=lambda n: -energy[n])
    sources, targets = ranks[: 2 * r : 2], ranks[1 : 2 * r : 2]
    chosen = {}
    for s in sources:
        alike = [cosine(tokens[s], tokens[n]) for n in targets]
        chosen[s] = next(n for n, each in zip(targets, alike, strict=True) if each >= max(alike) - 1e-5)  # ties
    return [
        joined(token, [tokens[s] for s in sources if chosen[s] == n], weighted)
        for n, token in enumerate(tokens)
        if n not in sources
    ]


def plain(model: Any, image: Tensor, method: Any, prefix: int, keep: int) -> tuple[Tensor, Tensor]:
    """Pooled output [D] and last rows [T, D] of one image."""
    rows, sizes = embed(model, image), [1] * (prefix + PATCHES)
    tokens = [Group([n], n, row, row) for n, row in enumerate(rows[prefix:])]
    plans = method.steps(BLOCKS, PATCHES, keep)
    for number, (block, passes) in enumerate(zip(blocks(model), plans, strict=True)):
        x = torch.cat([rows[:prefix], *(token.row[None] for token in tokens)])
        sizes = [1] * prefix + [token.size if method.proportional else 1 for token in tokens]
        seen = one_block(block, x, torch.tensor(sizes))
        rows = x = seen.rows
        metric = x if method.metric == "features" else seen.key.mean(1)
        tokens = [
            Group(token.patches, token.place, row, each)
            for token, row, each in zip(tokens, x[prefix:], metric[prefix:].detach(), strict=True)
        ]
        for r in filter(None, passes):
            if method.name == "tome":
                tokens = tome_step(tokens, r, prefix > 0)
            else:
                tokens = pitome_step(tokens, r, 0.9 - 0.9 * number / BLOCKS, method.weighted)
    tokens.sort(key=lambda token: token.place)
    rows = torch.cat([rows[:prefix], *(token.row[None] for token in tokens)])
    return pool(model, rows), rows


# --- exactness
@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_by_hand_are_the_model(name: str) -> None:
    model, images = build(name), pixels(1)
    with torch.no_grad():
        by_hand, _ = plain(model, images[0], METHODS["tome"], PREFIX[name], PATCHES)
        assert float((encode(model, images)[0] - by_hand).abs().max()) <= LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("keep", [10, 3])
def test_what_is_left_is_that_of_the_plain_loop(name: str, kind: str, keep: int) -> None:
    model, images, method = build(name), pixels(2), METHODS[kind]
    last: list[Tensor] = []
    with torch.no_grad(), vtc.compress(model, method, keep=keep) as handle:
        end = vtc.adapters.encoder_of(model).vision_layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
        found = encode(model, images)
        end.remove()
    assert handle.stats.visual_tokens_in == 2 * PATCHES
    assert handle.stats.calls[0].visual_tokens_kept == (float(keep),) * 2
    for image, got, rows in zip(images, found, last[0], strict=True):
        with torch.no_grad():
            expected, left = plain(model, image, method, PREFIX[name], keep)
        assert rows.shape == left.shape == (PREFIX[name] + keep, 32)
        assert float((rows - left).abs().max()) <= LIMIT
        assert float((got - expected).abs().max()) <= LIMIT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tome", "pitome"])
def test_a_retention_of_one_changes_no_bit_and_a_batch_is_its_images(name: str, kind: str) -> None:
    model, images, method = build(name), pixels(), METHODS[kind]
    with torch.no_grad():
        untouched = encode(model, images)
        with vtc.compress(model, method, retention=1.0) as handle:
            assert torch.equal(encode(model, images), untouched)
        assert handle.stats.retention == 1.0
        with vtc.compress(model, method, retention=0.5) as handle:
            together = encode(model, images)
            alone = torch.cat([encode(model, image[None]) for image in images])
        assert torch.equal(encode(model, images), untouched)
    assert handle.stats.retention == 0.5
    assert float((together - alone).abs().max()) <= LIMIT
    assert float((together - untouched).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "open_clip"])
@pytest.mark.parametrize("kind", ["tome", "pitome"])
def test_gradients_are_those_of_the_plain_loop(name: str, kind: str) -> None:
    model, method = build(name), METHODS[kind]
    images = pixels(1).requires_grad_()
    with vtc.compress(model, method, keep=8):
        encode(model, images).square().sum().backward()
    found, images.grad = images.grad, None
    plain(model, images[0], method, PREFIX[name], 8)[0].square().sum().backward()
    assert found is not None and images.grad is not None
    assert float((found - images.grad).abs().max() / images.grad.abs().max()) <= 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tome", "pitome"])
def test_bfloat16_runs(name: str, kind: str) -> None:
    model = build(name, torch.bfloat16)
    if kind == "tome":
        for method in INSIDE:
            budget = {} if method == "pixelprune" else {"retention": 0.5}
            with torch.no_grad(), vtc.compress(model, method, **budget):
                assert bool(encode(model, pixels(2).bfloat16()).isfinite().all())
    with torch.no_grad(), vtc.compress(model, METHODS[kind], retention=0.5) as handle:
        output = encode(model, pixels(2).bfloat16())
    assert output.dtype == torch.bfloat16 and bool(output.isfinite().all())
    assert handle.stats.retention == 0.5


def test_statistics_and_trace() -> None:
    model = build("CLIPModel")
    with torch.no_grad(), vtc.compress(model, "pitome", inside=True, keep=8) as handle:
        encode(model, pixels(2))
    call = handle.stats.calls[0]
    assert call.visual_tokens_in == (16, 16)
    assert call.entering == ((1, (16, 16)), (1, (13, 13)), (1, (10, 10)))
    assert call.layer_rows == (17, 14, 11)
    assert [(stage.visual_tokens_in, stage.visual_tokens_out) for stage in call.stages] == [
        (32, 26),
        (26, 20),
        (20, 16),
    ]
    record = handle.trace[0]
    assert [len(kept) for kept in record.items[0].kept.values()] == [13, 10, 8]
    assert record.items[1].map(EncoderStage(3)).shape == (1, 4, 4)
    with torch.no_grad(), vtc.compress(model, "pitome", inside=True, keep=8, trace=False) as handle:
        encode(model, pixels(1))
    assert handle.trace == [] and len(handle.stats.calls) == 1


@torch.no_grad()
def test_views_know_rows_and_columns_of_pictures_that_are_no_squares() -> None:
    model, method, images = (
        build("Dinov2Model"),
        Inside((0,), 6),
        torch.cat([pixels(2), pixels(2, seed=1)], 3)[..., :48],
    )
    with vtc.compress(model, method) as handle:
        encode(model, images)
    (item, _) = method.views[0].items.layouts
    assert item.grid == (1, 4, 6) and item.crop_grid == (4, 6)
    assert handle.trace[0].items[0].map(EncoderStage(0)).shape == (1, 4, 6)
    with vtc.compress(model, "pixelprune") as handle:
        encode(model, images[:, :, :1, :1].expand_as(images))
    assert handle.stats.calls[0].visual_tokens_kept == (1.0, 1.0)  # one colour
    with vtc.compress(model, "expediting_vit", clusters=(2, 3)) as handle:
        assert model(images).last_hidden_state.shape == (2, 25, 32)
    assert handle.stats.calls[0].layer_rows == (25, 7, 7)


@pytest.mark.parametrize("second", ["tome", "pitome", "diffrate", "token_transforming", "zero_tprune"])
@torch.no_grad()
def test_methods_inside_follow_one_another(second: str) -> None:
    """The second one gets its share of what the first one left, picture by picture or evenly."""
    model, images = build("CLIPVisionModel"), pixels(2)
    images[0, :, :8] = images[0, :, :8, :1]  # rows of one colour: its four patches there are equal
    options = {"inside": True} if second in METHODS else {}
    parts = [vtc.create("pixelprune"), vtc.create(second, **options)]
    with vtc.compress(model, parts, retention=[None, 0.5]) as handle:
        encode(model, images[:1])
    assert handle.stats.calls[0].entering[0] == (1, (13,))
    assert handle.stats.calls[0].visual_tokens_kept == (7.0,)
    assert len(handle.trace[0].items[0].kept[EncoderStage(0)]) == 13
    with vtc.compress(model, parts, retention=[None, 0.5]) as handle:
        if second == "zero_tprune":
            encode(model, images)
            assert handle.stats.calls[0].visual_tokens_kept == (7.0, 8.0)
        else:
            with pytest.raises(UnsupportedCall, match="left 13 to 16 of them; pass pictures one by one"):
                encode(model, images)


# --- methods of one's own
@dataclass(frozen=True)
class Inside(Compressor):
    """Keeps the patches of largest norm, a fixed number or those above the mean."""

    at: tuple[int, ...] = (1,)
    count: int | None = 1
    needs: Needs = field(default_factory=Needs)
    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "inside"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan(tuple(map(EncoderStage, self.at)), self.needs, "compact")

    def select(self, view: StageView) -> Selection:
        self.views.append(view)
        norm = view.tokens.norm(dim=-1)
        if self.count is None:
            return Selection(norm > view.mean(norm)[:, None])
        counts = [self.count] * len(view.items)
        return Selection(top_k(norm, torch.tensor(counts), view.items.mask), counts=counts)


@pytest.mark.parametrize("name", NAMES)
def test_class_and_register_tokens_stay(name: str) -> None:
    """A method sees the patches alone; what it leaves stands behind the other tokens, which every block gets."""
    model, method, seen, prefix = build(name), Inside((1, 3)), list[Tensor](), PREFIX[name]
    with torch.no_grad(), vtc.compress(model, method):
        for layer in vtc.adapters.encoder_of(model).vision_layers:
            layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True)
            layer.register_forward_hook(lambda m, args, out: seen.append(out))
        encode(model, pixels(2))
    view = method.views[0]
    assert not view.visual[:, :prefix].any() and view.visual[:, prefix:].all()
    assert view.items.counts == (PATCHES, PATCHES)
    assert [rows.shape[1] - prefix for rows in seen] == [16, 16, 1, 1, 1, 1]
    assert torch.equal(seen[2][:, :prefix], seen[1][:, :prefix])


@pytest.mark.parametrize("name", NAMES)
def test_images_may_keep_different_numbers_where_the_class_token_is_pooled(name: str) -> None:
    model, images = build(name), pixels(3, seed=5)
    with torch.no_grad():
        if name in POOLED:
            with vtc.compress(model, Inside((1, 2), None)), pytest.raises(UnsupportedMethod, match="padding included"):
                encode(model, images)
            return
        with vtc.compress(model, Inside((1, 2), None, Needs({2: Rows.RECEIVED}))) as handle:
            together = encode(model, images)
            alone = torch.cat([encode(model, image[None]) for image in images])
    kept = handle.stats.calls[0].visual_tokens_kept
    assert len(set(kept)) > 1
    assert kept == tuple(call.visual_tokens_kept[0] for call in handle.stats.calls[1:])
    assert float((together - alone).abs().max()) <= LIMIT


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Dinov2WithRegistersModel", "open_clip"])
@torch.no_grad()
def test_attention_is_read_beside_the_computation(name: str) -> None:
    """What each patch receives in the second block, from queries and keys by hand."""
    model, image = build(name), pixels(1)
    method = Inside((2,), PATCHES, Needs({1: Rows.RECEIVED}))
    with vtc.compress(model, method):
        encode(model, image)
    first, second = blocks(model)[:2]
    x = embed(model, image[0])
    for number, block in enumerate((first, second)):
        q, k, v = ((block.before(x) @ weight.T + bias).unflatten(-1, (4, 8)) for weight, bias in block.qkv)
        weights = torch.einsum("qhd,khd->hqk", q, k).div(math.sqrt(8)).softmax(-1)
        if number:
            break
        x = x + block.after(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        x = x + block.second(x)
    expected = weights.mean((0, 1))[PREFIX[name] :]
    assert float((method.views[0].vision_attention(1)[0] - expected).abs().max()) <= 5e-6


def test_the_document_says_what_happens() -> None:
    path = Path(__file__).parents[1] / "docs" / "encoders.md"
    outcome = doctest.testfile(str(path), module_relative=False)
    assert outcome.failed == 0 and outcome.attempted > 8


# --- nothing left behind, nobody else concerned
def surface(model: Any) -> list[tuple[Any, ...]]:
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", NAMES)
def test_leaving_removes_everything(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        encode(model, pixels(1))
        before = surface(model)
        with vtc.compress(model, "pitome", inside=True, retention=0.5):
            assert surface(model) != before
            clone = copy.deepcopy(model)
            with pytest.raises(VTCError, match="already has a method attached"):
                vtc.compress(model, "pitome", inside=True, retention=0.5)
        assert surface(model) == surface(clone) == before
        assert torch.equal(encode(clone, pixels(2)), encode(model, pixels(2)))
        handle = vtc.compress(model, METHODS["tome"], retention=0.5)
        with handle, pytest.raises(Exception, match=r"."):
            encode(model, torch.zeros(1, 5, 32, 32))  # five channels
        assert surface(model) == before and not handle.stats.calls
    assert taps._taps == {}


def test_threads_do_not_meet() -> None:
    model, other = build("CLIPModel"), build("CLIPModel")
    images = pixels(4)
    with torch.no_grad():
        untouched = encode(other, images)
        found: dict[str, list[Tensor]] = {"touched": [], "untouched": []}
        barrier = threading.Barrier(2, timeout=60)

        def work(key: str, one: Any) -> None:
            with torch.no_grad():
                for _ in range(5):
                    barrier.wait()
                    found[key].append(encode(one, images))

        with vtc.compress(model, "pitome", inside=True, retention=0.5):
            expected = encode(model, images)
            threads = [threading.Thread(target=work, args=pair) for pair in (("touched", model), ("untouched", other))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert all(torch.equal(each, untouched) for each in found["untouched"]) and len(found["untouched"]) == 5
    assert all(torch.equal(each, expected) for each in found["touched"]) and len(found["touched"]) == 5


# --- refusals
@pytest.mark.parametrize("method", vtc.list_methods())
def test_methods_that_act_elsewhere_are_refused_by_name(method: str) -> None:
    model = build("CLIPVisionModel")
    one = vtc.method.registry.METHODS.get(method).from_options()
    budget = {"retention": 0.5} if one.needs_budget else {}
    if method in INSIDE:
        with torch.no_grad(), vtc.compress(model, one, **budget) as handle:
            encode(model, pixels(2))
        assert handle.stats.calls[0].batch == 2
        return
    with pytest.raises(UnsupportedMethod, match=f"'{method}' does not act inside the vision encoder alone"):
        vtc.compress(model, one, **budget)


def test_refusals() -> None:
    model = build("CLIPModel")
    with pytest.raises(VTCError, match="pad_output given for a CLIPModel, which has no LLM"):
        vtc.compress(model, "pitome", inside=True, retention=0.5, pad_output=True)
    with pytest.raises(UnsupportedModel, match="CLIPModel is a vision encoder without an LLM"):
        vtc.share_encoder(model)
    with vtc.compress(model, "pitome", inside=True, retention=0.5) as handle:
        assert handle.prompt_length is None and handle.positions == "preserve"
        with pytest.raises(VTCError, match="has no prompt"):
            handle.prompt_length = 3
    dino = build("Dinov2Model")
    with (
        vtc.compress(dino, "pitome", inside=True, retention=0.5),
        pytest.raises(UnsupportedCall, match="attention_mask over all"),
    ):
        dino(pixels(1), attention_mask=torch.ones(1, 17))
    eager = transformers.ViTModel(transformers.ViTConfig(**VISION, attn_implementation="eager"))
    with pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"):
        vtc.compress(eager, "pitome", inside=True, retention=0.5)
    with torch.no_grad(), vtc.compress(eager, "pitome", inside=True, metric="features", retention=0.5) as handle:
        eager(pixels(1))
    assert handle.stats.retention == 0.5


def test_what_open_clip_has_otherwise_is_refused() -> None:
    resnet = open_clip.model.CLIP(16, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}, OPEN_TEXT)
    with pytest.raises(UnsupportedModel, match="with a ModifiedResNet for images"):
        vtc.compress(resnet, "pitome", inside=True, retention=0.5)
    custom = open_clip.model.CLIP(16, {**OPEN, "qk_norm": True}, OPEN_TEXT)
    with pytest.raises(UnsupportedModel, match="with Attention in its blocks"):
        vtc.compress(custom, "pitome", inside=True, retention=0.5)
    model = build("open_clip")
    with vtc.compress(model, "pitome", inside=True, retention=0.5):
        with pytest.raises(UnsupportedCall, match=r"forward_intermediates\(\) runs the layers"):
            model.visual.forward_intermediates(pixels(1))
        model.set_grad_checkpointing()
        with pytest.raises(UnsupportedCall, match="gradient checkpointing of open_clip"):
            encode(model, pixels(1))


class Mine(transformers.CLIPVisionModel):
    """A class derived from a supported one."""


def test_models_are_found_by_their_base_class() -> None:
    mine = Mine(transformers.CLIPVisionConfig(**VISION))
    assert vtc.adapters.encoder_of(mine).family == "clip"
    with torch.no_grad(), vtc.compress(mine, "pitome", inside=True, retention=0.5) as handle:
        mine(pixels(1))
    assert handle.stats.retention == 0.5
    assert vtc.adapters.encoder_of(torch.nn.Linear(2, 2)) is None
