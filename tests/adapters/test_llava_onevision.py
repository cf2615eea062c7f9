"""LLaVA-OneVision: shrunk maps, untiled images, one newline per video; against the model's own features."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc import adapters
from vtc.adapters.compat import EXPANDS_IN_ORDER
from vtc.method.base import Compressor, Needs, Rows
from vtc.testing import FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import against_oracle, batch_against_singles, generate, identical
from vtc.testing.tiny_llava import SIDE
from vtc.testing.tiny_llava_onevision import SIZES

NAME = "llava-onevision"
GRID, WIDTH, LIMIT = 4, 32, 4  # patches along a crop's side, width of the encoder, crops of "anyres_max_4"
TILINGS = {
    (100, 110): (4, 4),
    (40, 50): (2, 2),
    (28, 60): (3, 3),
    (80, 62): (3, 3),
    (25, 25): (1, 1),
    (112, 20): (4, 4),
    (20, 52): (1, 2),
    (100, 90): (4, 4),
}
BATCHES = [[size] for size in TILINGS] + [[(100, 110), (25, 25), (20, 52)]]


def cut_map(size: tuple[int, int]) -> tuple[range, range]:
    """Rows and columns of the stitched map that unpadding leaves."""
    height, width = (GRID * count for count in TILINGS[size])
    if size[1] / size[0] > width / height:
        margin = (height - int(round(size[0] * width / size[1], 7))) // 2
        return range(margin, height - margin), range(width)
    margin = (width - int(round(size[1] * height / size[0], 7))) // 2
    return range(height), range(margin, width - margin)


def map_shape(size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the map in the prompt."""
    rows, cols = cut_map(size)
    ratio = math.sqrt(len(rows) * len(cols) / (LIMIT * GRID**2))
    return (int(len(rows) // ratio), int(len(cols) // ratio)) if ratio > 1.1 else (len(rows), len(cols))


def axis(cut: range, tokens: int) -> Tensor:
    """Places on the stitched map that the `tokens` tokens along one axis stand for: centres of equal stretches."""
    stretch = len(cut) / tokens
    return torch.tensor([cut[0] + (i + 0.5) * stretch - 0.5 for i in range(tokens)])


def images(sizes: list[tuple[int, int]], seed: int = 0, *, tiled: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = [1 + TILINGS[size][0] * TILINGS[size][1] if tiled else 1 for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, SIDE, SIDE)
    for image, count in zip(pixels, counts, strict=True):
        image[:count] = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return pixels, torch.tensor(sizes)


class Nothing(nn.Module):
    """A projector that changes nothing and remembers what came in."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden


def without_projector() -> tuple[Any, Nothing]:
    model = tiny_model(NAME)
    model.model.multi_modal_projector = projector = Nothing()
    model.model.image_newline = nn.Parameter(torch.full((WIDTH,), 7.0))
    return model, projector


def test_the_sizes_cover_what_there_is() -> None:
    assert set(SIZES) <= set(TILINGS)
    shrunk = {size for size in TILINGS if map_shape(size) != tuple(map(len, cut_map(size)))}
    assert shrunk == {(100, 110), (80, 62), (100, 90)}


@pytest.mark.parametrize("sizes", BATCHES)
def test_packing_of_images_equals_the_models_own(sizes: Any, encode: Any) -> None:
    model, projector = without_projector()
    output, context = encode(model, "image", *images(sizes))
    tokens = context.to_tokens(projector.seen)
    for found, expected, item in zip(tokens, output.pooler_output, context.items, strict=True):
        assert found.shape == expected.shape == (item.n_tokens, WIDTH)
        assert torch.equal(found.isnan().all(1), item.newline)
        assert torch.equal(found.nan_to_num(7.0), expected)


@pytest.mark.parametrize("sizes", BATCHES)
def test_places_of_image_tokens(sizes: Any, encode: Any) -> None:
    _, context = encode(tiny_model(NAME), "image", *images(sizes))
    for size, item in zip(sizes, context.items, strict=True):
        rows, cols = map_shape(size)
        assert item.regions == ((1, GRID, GRID), (1, rows, cols))
        assert (item.newlines, item.n_tokens) == (rows, GRID**2 + rows * (cols + 1))
        newline = item.newline[GRID**2 :].view(rows, cols + 1)
        assert bool(newline[:, -1].all())
        assert not newline[:, :-1].any()
        high, wide = (axis(cut, n) for cut, n in zip(cut_map(size), (rows, cols), strict=True))
        crop, row, col = (v[GRID**2 :].view(rows, cols + 1)[:, :-1] for v in (item.crop, item.row, item.col))
        tile_row, tile_col = ((place + 0.5) // GRID for place in (high, wide))
        assert torch.equal(crop, (1 + tile_row[:, None] * TILINGS[size][1] + tile_col).long())
        assert torch.allclose(row, (high - tile_row * GRID)[:, None].expand_as(row), atol=1e-4)
        assert torch.allclose(col, (wide - tile_col * GRID).expand_as(col), atol=1e-4)
        assert item.crop[: GRID**2].unique().tolist() == [0]
        assert item.crop[item.newline].unique().tolist() == [-1]
        assert (item.thumbnail, item.tiling, item.grid) == (0, TILINGS[size], None)


def test_a_call_may_name_another_limit(encode: Any) -> None:
    model, projector = without_projector()
    output, context = encode(model, "image", *images([(100, 110)]), vision_aspect_ratio="anyres_max_9")
    (tokens,), (item,) = context.to_tokens(projector.seen), context.items
    assert torch.equal(tokens.nan_to_num(7.0), output.pooler_output[0])
    assert item.regions[1] > (1, *map_shape((100, 110)))


def test_several_images_of_a_prompt_are_not_tiled(encode: Any) -> None:
    model, projector = without_projector()
    sizes = [(100, 110), (40, 50), (25, 25)]
    pixels, table = images(sizes)
    pixels[:2, 1:] = 0
    output, context = encode(model, "image", pixels, table, batch_num_images=torch.tensor([2, 1]))
    tokens = context.to_tokens(projector.seen)
    for found, expected in zip(tokens, output.pooler_output, strict=True):
        assert torch.equal(found.nan_to_num(7.0), expected)
    first, second, third = context.items
    for item in (first, second):
        assert (item.n_tokens, item.newlines, item.n_crops) == (17, 1, 1)
        assert (item.thumbnail, item.tiling, item.grid, item.regions) == (None, None, None, ((1, 4, 4),))
        assert item.crop.tolist() == [0] * 16 + [-1]
        assert item.row.tolist() == [row for row in range(4) for _ in range(4)] + [-1]
    assert (third.n_crops, third.tiling) == (2, (1, 1))
    _, others = encode(model, "image", pixels[[1, 0], :1], table[[1, 0]], batch_num_images=torch.tensor([2]))
    assert others.fingerprint.tolist() == context.fingerprint[[1, 0]].tolist()


def test_attention_is_shrunk_like_the_features(look: Any, encoder_attention: Any, limits: Any) -> None:
    model = tiny_model(NAME)
    inputs = tiny_inputs(NAME, [[3, "image", 4]], seed=0, model=model)
    (size,) = [tuple(size) for size in inputs["image_sizes"].tolist()]
    assert size in {(100, 110), (80, 62)}
    view = look(model, inputs, {3: Rows.RECEIVED})
    weights = encoder_attention(NAME, "image", inputs["pixel_values"], inputs["image_sizes"])[3].mean(1)
    tiles = weights[1:].view(*TILINGS[size], GRID, GRID).transpose(1, 2)
    rows, cols = cut_map(size)
    stitched = tiles.reshape(GRID * TILINGS[size][0], -1)[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    shrunk = nn.functional.interpolate(stitched[None, None], size=map_shape(size), mode="bilinear")
    expected = torch.cat([weights[0], shrunk.flatten()])
    assert float((view.vision_attention(3)[0] - expected).abs().max()) <= limits.attention


# --- videos
def test_packing_of_videos_equals_the_models_own(encode: Any) -> None:
    model, projector = without_projector()
    pixels = torch.randn(2, 5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    output, context = encode(model, "video", pixels)
    tokens = context.to_tokens(projector.seen)
    for found, expected, item in zip(tokens, output.pooler_output, context.items, strict=True):
        assert found.shape == (item.n_tokens, WIDTH) == (21, WIDTH)
        assert torch.equal(found.nan_to_num(7.0)[: len(expected)], expected)  # 5.17 adds the newline later
        assert torch.equal(found.isnan().all(1), item.newline)
        assert item.newline.tolist() == [False] * 20 + [True]
        assert item.crop.tolist() == [frame for frame in range(5) for _ in range(4)] + [-1]
        assert item.row.tolist() == [0.5, 0.5, 2.5, 2.5] * 5 + [-1]
        assert item.col.tolist() == [0.5, 2.5, 0.5, 2.5] * 5 + [-1]
        assert (item.newlines, item.grid, item.regions, item.n_crops) == (1, None, ((5, 2, 2),), 5)


def test_frames_of_odd_sides_are_pooled_to_the_next_larger_half(encode: Any) -> None:
    from transformers import LlavaOnevisionForConditionalGeneration

    config = tiny_model(NAME).config
    config.vision_config.image_size = 35
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.model.multi_modal_projector = projector = Nothing()
    model.model.image_newline = nn.Parameter(torch.full((WIDTH,), 7.0))
    output, context = encode(model, "video", torch.randn(1, 2, 3, 35, 35))
    (found,), (item,) = context.to_tokens(projector.seen), context.items
    assert item.regions == ((2, 3, 3),)
    assert torch.equal(found[:-1], output.pooler_output[0][:18])
    assert torch.allclose(item.row[:9:3], torch.tensor([1 / 3, 2, 11 / 3]))


def test_attention_of_frames_is_pooled_like_their_features(look: Any, encoder_attention: Any, limits: Any) -> None:
    inputs = tiny_inputs(NAME, [[2, "video", 3], [4, "video"]], seed=3)
    view = look(tiny_model(NAME), inputs, {2: Rows.RECEIVED})
    row = encoder_attention(NAME, "video", inputs["pixel_values_videos"])[2].mean(1)
    pooled = row.view(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    assert float((view.vision_attention(2) - pooled).abs().max()) <= limits.attention


# --- the engine on what the contract's batches do not hold
BOTH: list[Any] = [[3, "image", 2, "video", 4], [2, "video", 6, "image", 3, "image", 1], [9]]
METHODS: list[tuple[Compressor, float | None]] = [
    (FixedKeep(at=(0, 1, 3)), None),
    (FixedKeep(at=(2,), static=False), None),
    (vtc.create("vtc_cls"), 0.4),
    (vtc.create("pool"), 0.4),
]


@pytest.mark.parametrize("name", [NAME, "llava-next-video"])
@pytest.mark.parametrize(("method", "retention"), METHODS, ids=["inside", "adaptive", "vtc_cls", "pool"])
def test_images_and_videos_in_one_prompt(name: str, method: Any, retention: Any, limits: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, BOTH, seed=3, extra=1, model=model)

    def attach(model: Any) -> vtc.Handle:
        return vtc.compress(model, method, retention=retention)

    modes = [{}, {"use_cache": False}, *([{"num_beams": 3, "num_return_sequences": 2}] if EXPANDS_IN_ORDER else [])]
    for mode in modes:
        assert against_oracle(model, inputs, attach, 4, **mode) <= limits.logits
    assert batch_against_singles(model, name, BOTH, attach, 4) <= limits.logits
    assert identical(model, inputs, lambda model: vtc.compress(model, "vtc_cls", retention=1.0)) == 0.0


@pytest.mark.parametrize("name", [NAME, "llava-next-video", "llava-next", "internvl"])
@pytest.mark.parametrize("method", ["random", "stride", "vtc_cls", "pool"])
def test_separators_count_against_the_budget_and_stay(name: str, method: str) -> None:
    model = tiny_model(name)
    layout = BOTH if "video" in adapters.of(model).placeholders else [[3, "image", 4], [2, "image", 3, "image"], [5]]
    inputs = tiny_inputs(name, layout, seed=5, model=model)
    for options in ({"retention": 0.3}, {"retention": 0.01}, {"keep": 9}):
        handle = vtc.compress(model, method, **options)
        generate(model, inputs, handle, 1)
        assert handle.budget is not None
        layouts = [item for context in _contexts(model, inputs) for item in context.items]
        assert len(layouts) == len(handle.trace[0].items) or name == "internvl"
        for item in handle.trace[0].items:
            found = [each for each in layouts if (each.kind, each.n_tokens) == (item.kind, len(item.positions))]
            newlines = found[0].newlines if found else 0
            if newlines:
                numbers = found[0].newline.nonzero().flatten()
                assert bool(torch.isin(numbers, item.kept[0]).all())
            granted = max(handle.budget.tokens(len(item.positions)), newlines + 1)
            assert len(item.kept[0]) == granted or (method == "pool" and len(item.kept[0]) < granted)


def _contexts(model: Any, inputs: dict[str, Tensor]) -> list[Any]:
    from vtc.engine.encoder import VisionRecorder

    found: list[Any] = []
    recorder = VisionRecorder(adapters.of(model), Needs(), encoded=lambda context, output: found.append(context))
    recorder.install()
    try:
        with torch.no_grad():
            model(**inputs)
        return found
    finally:
        recorder.remove()


@pytest.mark.parametrize("name", [NAME, "llava-next-video", "llava-next", "internvl"])
@pytest.mark.parametrize("method", ["random", "vtc_cls"])
def test_every_crop_and_frame_keeps_the_same_share(name: str, method: str, look: Any) -> None:
    model = tiny_model(name)
    for kind in adapters.of(model).placeholders:
        inputs = tiny_inputs(name, [[3, kind, 4], [2, kind]], seed=5, model=model)
        view = look(model, inputs)
        handle = vtc.compress(model, method, retention=0.4)
        generate(model, inputs, handle, 1)
        for index, item in enumerate(handle.trace[0].items):
            kept = torch.isin(view.items.token[index], item.kept[0]) & view.items.mask[index]
            crop, sizes = view.crop[index], view.items.counts[index]
            for number in range(view.items.layouts[index].n_crops):
                mine = crop == number
                exact = int(mine.sum()) * int(kept.sum()) / sizes
                assert math.floor(exact) <= int((mine & kept).sum()) <= math.ceil(exact)


def test_the_adapter_declares_its_family() -> None:
    adapter = adapters.of(tiny_model(NAME))
    assert (adapter.family, adapter.modalities) == (NAME, ("image", "video"))
    assert adapter.placeholders == {"image": 120, "video": 121}
    spec = adapter.spec
    assert (spec.vision_layers, spec.feature_layer, spec.has_cls, spec.llm_layers) == (4, 3, False, 4)
    assert all(reference.family == NAME for reference in adapter.references)
