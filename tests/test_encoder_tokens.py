"""Encoder stages where LLM tokens are made of several patches, and in packed towers: dropped patches are masked ones.

The reference is the untouched model, whose attention function is exchanged for one that hides the patches of dropped
tokens from the layers behind each stage.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

import vtc
from vtc import adapters
from vtc.engine.encoder import context_of
from vtc.errors import UnsupportedMethod
from vtc.method.base import Compressor, EncoderStage, ModelSpec, Needs, Plan, Rows, Selection, Stage, StageView
from vtc.testing import tiny_model
from vtc.testing.tiny_llava import SIDE
from vtc.testing.tiny_qwen import CHANNELS, MERGE, PAIR, PATCH

PACKED = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
CROPS = [
    ("llava-next-video", "image"), ("llava-next-video", "video"), ("llava-onevision", "image"),
    ("llava-onevision", "video"), ("internvl", "image"),
]  # fmt: skip
CASES = CROPS + [(name, kind) for name in PACKED for kind in ("image", "video")]
GRIDS = {"image": [(1, 8, 6), (1, 4, 4), (1, 12, 10), (1, 4, 4)], "video": [(3, 4, 6), (2, 6, 10)]}
STAGES = [{1: 3}, {0: 3, 2: 2}, {2: 2, 4: 3}]


@dataclass(frozen=True)
class Gaps(Compressor):
    """Drops every token whose number in its crop a stage's number divides; `merge` writes other rows over the rest."""

    gaps: tuple[tuple[int, int], ...] = ((1, 3),)
    later: tuple[Stage, ...] = ()
    needs: Needs = field(default_factory=Needs)
    merge: bool = False
    views: list[StageView] = field(default_factory=list, compare=False)

    name: ClassVar[str] = "gaps"

    @property
    def needs_budget(self) -> bool:
        return False

    def plan(self, model: ModelSpec) -> Plan:
        return Plan((*(EncoderStage(layer) for layer, _ in self.gaps), *self.later), self.needs, "compact")

    def select(self, view: StageView) -> Selection | None:
        self.views.append(view)
        if not isinstance(view.stage, EncoderStage):
            return None
        keep = view.items.token % dict(self.gaps)[view.stage.layer] != 0
        return Selection(keep, tokens=view.tokens.flip(-1) if self.merge else None)


def arguments(name: str, kind: str, seed: int = 0) -> dict[str, Any]:
    """Arguments of a feature call with several items."""
    generator = torch.Generator().manual_seed(seed)
    if name in PACKED:
        grids = GRIDS[kind]
        pixels = torch.randn(sum(t * h * w for t, h, w in grids), CHANNELS * PAIR * PATCH**2, generator=generator)
        suffix = "_videos" if kind == "video" else ""
        return {f"pixel_values{suffix}": pixels, f"{kind}_grid_thw": torch.tensor(grids)}
    if name == "internvl":
        more = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator), **more}
    if kind == "video":
        return {"pixel_values_videos": torch.randn(2, 3, 3, SIDE, SIDE, generator=generator)}
    sizes = torch.tensor([[40, 50], [28, 60]])
    return {"pixel_values": torch.randn(2, 10, 3, SIDE, SIDE, generator=generator), "image_sizes": sizes}


def encode(model: Any, kind: str, given: dict[str, Any]) -> Any:
    return getattr(model.model, f"get_{kind}_features")(**given, return_dict=True)


def rows_of(features: Any) -> Tensor:
    """All features, [n, D]."""
    return torch.cat([item.flatten(0, -2) for item in features])


def marks(model: Any, name: str, kind: str, given: dict[str, Any], gaps: dict[int, int], layer: int) -> Tensor:
    """[sequences, T] which rows of the untouched encoder take part in `layer`."""
    moduli = [gap for stage, gap in gaps.items() if stage <= layer]

    def stays(tokens: int) -> Tensor:
        number = torch.arange(tokens)
        kept = torch.ones(tokens, dtype=torch.bool)
        for gap in moduli:
            kept &= number % gap != 0
        return kept

    if name in PACKED:
        tokens = [stays(h * w // MERGE**2) for t, h, w in GRIDS[kind] for _ in range(t)]
        seats = torch.cat(tokens)
        if name == "qwen2.5-vl":
            from transformers.vision_utils import get_vision_window_index

            config = model.config.vision_config
            seats = seats[get_vision_window_index(given[f"{kind}_grid_thw"], MERGE, config.window_size, PATCH)[0]]
        return seats.repeat_interleave(MERGE**2)[None]
    side = 8 if name == "internvl" else 4
    unit = 1 if kind == "image" and name != "internvl" else 2
    row = torch.arange(side) // unit
    number = (row[:, None] * (side // unit) + row).flatten()
    lead = int(adapters.of(model).spec.has_cls)
    return torch.nn.functional.pad(stays((side // unit) ** 2)[number], (lead, 0), value=True)[None]


@contextlib.contextmanager
def masked(model: Any, hidden: list[Tensor]) -> Iterator[None]:
    """The encoder's attention with the rows whose mark in `hidden` [layer] is False as no keys."""
    layer_of = {id(module): layer for layer, module in enumerate(adapters.of(model).vision_attention)}
    place = dict.fromkeys(layer_of, 0)

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **more: Any
    ) -> Any:
        alive, start = hidden[layer_of[id(module)]], place[id(module)]
        if alive.shape[1] != q.shape[2]:  # one segment of a packed sequence
            place[id(module)] = (start + q.shape[2]) % alive.shape[1]
            alive = alive[:, start : start + q.shape[2]]
        logits = (q @ k.transpose(2, 3)) * scaling
        weights = logits.masked_fill(~alive[:, None, None], -1e9).softmax(-1)
        return (weights @ v).transpose(1, 2), None

    AttentionInterface.register("masked_by_hand", attention)
    modules = adapters.of(model).vision_attention
    before = modules[0].config._attn_implementation
    for module in modules:
        module.config._attn_implementation = "masked_by_hand"
    try:
        yield
    finally:
        for module in modules:
            module.config._attn_implementation = before


@pytest.mark.parametrize("gaps", STAGES, ids=["one", "two, from the first", "and behind the last"])
@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_dropped_tokens_are_masked_patches(name: str, kind: str, gaps: dict[int, int], limits: Any) -> None:
    model, given = tiny_model(name), arguments(name, kind)
    last = adapters.of(model).spec.feature_layer
    gaps = {min(stage, last + 1): gap for stage, gap in gaps.items()}
    layers = len(adapters.of(model).vision_layers)
    with masked(model, [marks(model, name, kind, given, gaps, layer) for layer in range(layers)]):
        reference = encode(model, kind, given)
    with vtc.compress(model, Gaps(tuple(gaps.items()))):
        output = encode(model, kind, given)
    context = context_of(output)
    assert context is not None and context.alive is not None
    alive = torch.cat([row[: item.n_tokens] for row, item in zip(context.alive[0], context.items, strict=True)])
    if name in PACKED:
        tokens = [h * w // MERGE**2 for t, h, w in GRIDS[kind] for _ in range(t)]
        expected = [int(all(n % gap for gap in gaps.values())) for count in tokens for n in range(count)]
        assert alive.int().tolist() == expected
    assert 0 < sum(context.alive[1]) == int(alive.sum()) < len(alive)
    assert float((rows_of(output.pooler_output) - rows_of(reference.pooler_output))[alive].abs().max()) <= limits.logits
    deep = [getattr(one, "deepstack_features", ()) for one in (output, reference)]
    for one, other in zip(*deep, strict=True):
        assert float((rows_of(one) - rows_of(other))[alive].abs().max()) <= limits.logits


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_the_view_shows_tokens(name: str, kind: str) -> None:
    """Tokens are numbered row by row, have the rows of all their patches side by side, and what was read of them."""
    model, given = tiny_model(name), arguments(name, kind)
    adapter = adapters.of(model)
    unit, seen = adapter.unit(kind), []  # type: ignore[arg-type]
    method = Gaps(((0, 5), (2, 2)), needs=Needs({-1: Rows.PIXELS, 0: Rows.KEYS, 1: Rows.HIDDEN}))
    hook = adapter.vision_layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    encode(model, kind, given)
    hook.remove()
    with vtc.compress(model, method):
        encode(model, kind, given)
    first = [view for view in method.views if view.stage == EncoderStage(0)]
    second = [view for view in method.views if view.stage == EncoderStage(2)]
    width = seen[0].shape[-1]
    for view in first:
        assert view.tokens.shape[-1] == unit**2 * width
        assert view.items.layouts[0].grid == (1, *view.items.layouts[0].crop_grid)
    for view in second:  # what was read of layer 1 is what left it
        shown = view.tokens.unflatten(2, (unit**2, width)).mean(2)
        assert float((view.vision_attention(1, Rows.HIDDEN) - shown).abs().max()) <= 1e-5
    if name not in PACKED:
        return
    # The processor writes the patches of a token side by side, and tokens row by row; layers may run in windows.
    pixels = next(iter(given.values())).view(-1, MERGE**2, CHANNELS * PAIR * PATCH**2).flatten(1)
    rasters = [(h // MERGE, w // MERGE) for t, h, w in GRIDS[kind] for _ in range(t)]
    frames = torch.split(pixels, [h * w for h, w in rasters])
    for view in first:
        (raster,) = {layout.crop_grid for layout in view.items.layouts}
        same = torch.stack([frame for frame, other in zip(frames, rasters, strict=True) if other == raster])
        assert torch.equal(view.vision_attention(-1, Rows.PIXELS), same)
    assert sum(len(view.items) for view in first) == len(rasters)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "internvl"])
@torch.no_grad()
def test_what_was_read_lies_at_its_token_before_the_llm(name: str, limits: Any) -> None:
    """Rows read in front of the stage are those of the untouched encoder, later ones are zero where a token is gone."""
    model, given = tiny_model(name), arguments(name, "image")
    needs = Needs({0: Rows.RECEIVED, 2: Rows.KEYS})
    with vtc.compress(model, Gaps((), later=(0,), needs=needs)):
        plain = context_of(encode(model, "image", given))
    with vtc.compress(model, Gaps(((1, 3),), later=(0,), needs=needs)):
        pruned = context_of(encode(model, "image", given))
    assert plain is not None and pruned is not None and pruned.alive is not None
    pair = (0, Rows.RECEIVED)
    assert float((plain.attention[pair] - pruned.attention[pair]).abs().max()) <= limits.attention
    rows = pruned.attention[2, Rows.KEYS].abs().sum(-1) > 0
    assert torch.equal(rows, pruned.alive[0])


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_merged_rows_take_the_place_of_their_token(name: str, limits: Any) -> None:
    """Rows that a method writes reach the next layer at their own places, those of every patch of the token."""
    model, given, seen = tiny_model(name), arguments(name, "image"), []
    keep = marks(model, name, "image", given, {1: 3}, 1)[0]
    layer = adapters.of(model).vision_layers[1]
    hook = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    encode(model, "image", given)
    hook.remove()
    with vtc.compress(model, Gaps(merge=True)):
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
        )
        encode(model, "image", given)
        hook.remove()
    (whole, before), (left, after) = seen
    flipped = whole.view(-1, MERGE**2 * whole.shape[-1]).flip(-1).view_as(whole)
    assert float((left - flipped[keep]).abs().max()) <= limits.hidden
    ends = before["cu_seqlens"].tolist()
    lengths = [int(keep[start:end].sum()) for start, end in itertools.pairwise(ends)]
    segments = after["cu_seqlens"]
    assert (segments[1:] - segments[:-1]).tolist() == [length for length in lengths if length]
    for one, other in zip(before["position_embeddings"], after["position_embeddings"], strict=True):
        assert torch.equal(one[keep], other)


@torch.no_grad()
def test_frames_whose_tokens_share_patches() -> None:
    """LLaVA-OneVision resizes frames of odd sides: dropping is refused, restored rows go through."""
    model = tiny_model("llava-onevision")
    model.config.vision_config.patch_size = model.config.vision_config.image_size // 3  # as the adapter reads it
    assert adapters.of(model).unit("video") == 0 and adapters.of(model).unit("image") == 1
    with vtc.compress(model, Gaps()), pytest.raises(UnsupportedMethod, match="each video token here of patches that"):
        encode(model, "video", arguments("llava-onevision", "video"))


@torch.no_grad()
def test_restored_rows_go_through_a_map_that_is_resized() -> None:
    model, given = tiny_model("llava-onevision"), arguments("llava-onevision", "image")
    given["image_sizes"] = torch.tensor([[100, 110], [100, 110]])  # 16 tiles, shrunk to the area of four
    given["pixel_values"] = torch.randn(2, 17, 3, SIDE, SIDE)
    with (
        vtc.compress(model, Gaps()),
        pytest.raises(UnsupportedMethod, match=r"each image token here .* smaller images"),
    ):
        encode(model, "image", given)
    plain = encode(model, "image", given).pooler_output
    with vtc.compress(model, "expediting_vit", clusters=(2, 2)):
        output = encode(model, "image", given)
    found = context_of(output)
    assert found is not None and found.alive is not None and found.alive[1] == (72, 72)  # all but newlines
    assert float((rows_of(output.pooler_output) - rows_of(plain)).abs().max()) > 0.05


def test_what_packed_encoders_refuse() -> None:
    qwen3, qwen25 = adapters.of(tiny_model("qwen3-vl")).spec, adapters.of(tiny_model("qwen2.5-vl")).spec
    for name in ("tome", "pitome"):
        with pytest.raises(UnsupportedMethod, match=r"qwen3-vl .* without a mask.* pass proportional=False"):
            vtc.create(name, inside=True).plan(qwen3)
        assert vtc.create(name, inside=True, proportional=False).plan(qwen25).stages
    with pytest.raises(UnsupportedMethod, match=r"limits to windows in blocks \[0, 2\].* \(\[2, 4\]\)"):
        vtc.create("token_transforming").plan(qwen25)
    assert vtc.create("token_transforming", layers=(2, 4)).plan(qwen25).stages == (EncoderStage(2), EncoderStage(4))


def test_sizes_are_refused_in_a_packed_encoder() -> None:
    class Sized(Gaps):
        def select(self, view: StageView) -> Selection:
            return Selection(view.items.token >= 0, sizes=torch.ones_like(view.items.token, dtype=torch.float32))

    model, match = tiny_model("qwen2-vl"), r"larger patches count more.*packed one of qwen2-vl takes none"
    with vtc.compress(model, Sized()), torch.no_grad(), pytest.raises(UnsupportedMethod, match=match):
        encode(model, "image", arguments("qwen2-vl", "image"))
