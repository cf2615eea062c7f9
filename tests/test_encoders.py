"""Encoders without an LLM: every method inside them keeps the contract, and what a user sees of it."""

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
import vtc.testing.inside.__main__ as command
from vtc.engine import taps
from vtc.errors import UnsupportedCall, UnsupportedMethod, UnsupportedModel, VTCError
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, StageView
from vtc.methods.pixelprune import PixelPrune
from vtc.ops.select import top_k
from vtc.testing.contract import raise_on_failure
from vtc.testing.encoders import (
    NAMES,
    OPEN,
    OPEN_TEXT,
    PATCHES,
    POOLED,
    PREFIX,
    VISION,
    blocks,
    build,
    by_hand,
    embed,
    encode,
    pixels,
)
from vtc.testing.inside import case_of
from vtc.testing.inside.contract import Cell, check, inside

LIMIT = 5e-5
METHODS = {name: vtc.create(name, inside=True) for name in ("tome", "pitome")}


# --- exactness
@pytest.mark.parametrize("name", NAMES)
def test_the_blocks_by_hand_are_the_model(name: str) -> None:
    model, images = build(name), pixels(1)
    with torch.no_grad():
        expected, _ = by_hand(model, images[0], lambda layer, rows, seen: (rows, None))
        assert float((encode(model, images)[0] - expected).abs().max()) <= LIMIT


@pytest.mark.parametrize("encoder", NAMES)
@pytest.mark.parametrize("name", inside("CLIPModel"))
def test_every_method_keeps_the_contract_on_every_encoder(name: str, encoder: str) -> None:
    """In all its variants; what has no plain loop fails by its name, and what is refused is named here."""
    cells = check(name, encoder)
    raise_on_failure(cells)
    assert all(cell.limit <= LIMIT for cell in cells)
    assert {cell.check for cell in cells} >= {
        "plain loop", "counts told", "batch = singles", "retention 1.0, bit-identical", "nothing left behind",
        "untouched behind it, bit-identical", "bfloat16 runs",
    }  # fmt: skip
    differing = {("pixelprune", "batch = singles")} if name == "pixelprune" and encoder in POOLED else set()
    assert {(cell.method, cell.check) for cell in cells if cell.refused} == differing
    assert inside(encoder).keys() == inside("CLIPModel").keys()


# --- the contract notices what it is there for
def test_the_contract_notices_another_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PixelPrune, "scan", lambda self, cells, tau: torch.ones_like(cells[..., 0], dtype=torch.bool))
    failed = {(cell.method, cell.check) for cell in check("pixelprune", "ViTModel") if not cell.passed}
    assert failed == {("pixelprune(tau=0.15)", "plain loop"), ("pixelprune(tau=0.15)", "counts told")}


def test_the_contract_notices_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def untidy(model: Any, *given: Any, **budget: Any) -> vtc.Handle:
        model.left_behind = object()
        return vtc.compress(model, *given, **budget)

    model = build("ViTModel")
    monkeypatch.setattr(
        "vtc.testing.inside.contract.built", lambda name, *dtype: build(name, *dtype) if dtype else model
    )
    monkeypatch.setattr("vtc.testing.inside.contract.compress", untidy)
    assert {cell.check for cell in check("pixelprune", "ViTModel") if not cell.passed} == {"nothing left behind"}


def test_methods_without_a_plain_loop_are_named() -> None:
    with pytest.raises(AssertionError, match=r"'fastv' acts inside encoders and has no plain loop; .*inside/fastv\.py"):
        case_of("fastv")


def test_the_command_lists_refusals_and_fails_above_a_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        Cell("mine", "ViTModel", "plain loop", 2e-6, LIMIT),
        Cell("mine", "ViTModel", "batch", 0.0, LIMIT, "why not"),
    ]
    monkeypatch.setattr(command, "check", lambda name, encoder: cells)
    monkeypatch.setattr(command, "inside", lambda encoder: ["mine"])
    command.main(["ViTModel"])
    shown = capsys.readouterr().out
    assert "| mine | 2.0e-06 * |" in shown and "| mine | batch | ViTModel | why not |" in shown
    cells.append(Cell("mine", "ViTModel", "plain loop", 1e-4, LIMIT))
    with pytest.raises(AssertionError, match=r"mine on ViTModel: plain loop: 1.00e-04 exceeds 5e-05"):
        command.main(["ViTModel"])


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "open_clip", "timm map"])
@pytest.mark.parametrize("kind", ["tome", "pitome"])
def test_gradients_are_those_of_the_plain_loop(name: str, kind: str) -> None:
    model, method = build(name), METHODS[kind]
    images = pixels(1).requires_grad_()
    with vtc.compress(model, method, keep=8):
        encode(model, images).square().sum().backward()
    found, images.grad = images.grad, None
    act = case_of(kind).plain(method, images[0], PREFIX[name], 8)
    by_hand(model, images[0], act)[0].square().sum().backward()
    assert found is not None and images.grad is not None
    assert float((found - images.grad).abs().max() / images.grad.abs().max()) <= 1e-4


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
def test_images_may_keep_different_numbers_where_pooling_leaves_padding_out(name: str) -> None:
    model, images = build(name), pixels(3, seed=2)
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
    assert kept == tuple(call.visual_tokens_kept[0] for call in list(handle.stats.calls)[1:])
    assert float((together - alone).abs().max()) <= LIMIT


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Dinov2WithRegistersModel", "open_clip", "timm map"])
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
    if inside("CLIPVisionModel").get(method) == {}:
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
