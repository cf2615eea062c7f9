"""LLaVA-NeXT and LLaVA-NeXT-Video: what a description says equals what the model does with its own features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc import adapters
from vtc.errors import UnsupportedModel
from vtc.method.base import Rows
from vtc.method.layout import VisualItem
from vtc.testing import TINY_MODELS, tiny_inputs, tiny_model
from vtc.testing.tiny_llava import SIDE
from vtc.testing.tiny_llava_next import PINPOINTS, SIZES

NAMES = ["llava-next", "llava-next-video"]
GRID, WIDTH = 4, 32  # patches along a crop's side, width of the encoder
TILINGS = {
    (40, 50): (2, 2),
    (30, 70): (1, 3),
    (90, 20): (3, 1),
    (56, 56): (2, 2),
    (50, 33): (2, 2),
    (20, 50): (1, 2),
    (56, 20): (2, 1),
    (10, 400): (1, 3),  # so flat that unpadding leaves no row of the map
}
BATCHES = [[size] for size in TILINGS] + [[(30, 70), (56, 56), (90, 20)], [(40, 50), (40, 50)]]
Place = tuple[int, int, int] | None


def tokens_of(size: tuple[int, int], tiling: tuple[int, int]) -> Iterator[Place]:
    """(crop, row, column) of every token in prompt order, None for a newline: written out from the model's rules."""
    yield from ((0, row, col) for row in range(GRID) for col in range(GRID))
    height, width = tiling[0] * GRID, tiling[1] * GRID
    rows, cols = range(height), range(width)
    if size[1] / size[0] > width / height:
        margin = (height - int(round(size[0] * width / size[1], 7))) // 2
        rows = range(margin, height - margin)
    else:
        margin = (width - int(round(size[1] * height / size[0], 7))) // 2
        cols = range(margin, width - margin)
    for row in rows:
        yield from ((1 + row // GRID * tiling[1] + col // GRID, row % GRID, col % GRID) for col in cols)
        yield None


def images(sizes: list[tuple[int, int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """pixel_values and image_sizes; missing crops are zero."""
    generator = torch.Generator().manual_seed(seed)
    counts = [1 + TILINGS[size][0] * TILINGS[size][1] for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, SIDE, SIDE)
    for image, count in zip(pixels, counts, strict=True):
        image[:count] = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return pixels, torch.tensor(sizes)


class Nothing(nn.Module):
    """A projector that changes nothing and remembers what came in."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden


def without_projector(name: str) -> tuple[Any, Nothing]:
    """The tiny model with a projector that does nothing and newlines of sevens."""
    model = tiny_model(name)
    model.model.multi_modal_projector = projector = Nothing()
    model.model.image_newline = nn.Parameter(torch.full((WIDTH,), 7.0))
    return model, projector


def with_class_token(patches: Tensor) -> Tensor:
    """[crops, P, C] as the encoder emits it, in front of the patches a row that must not matter."""
    return torch.cat([torch.full_like(patches[:, :1], 99.0), patches], dim=1)


def test_the_sizes_cover_what_there_is() -> None:
    assert set(SIZES) <= set(TILINGS)
    assert {tuple(pinpoint) for pinpoint in PINPOINTS} >= {(r * SIDE, c * SIDE) for r, c in TILINGS.values()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", BATCHES)
def test_packing_of_images_equals_the_models_own(name: str, sizes: Any, encode: Any) -> None:
    model, projector = without_projector(name)
    output, context = encode(model, "image", *images(sizes))
    tokens = context.to_tokens(with_class_token(projector.seen))
    assert len(tokens) == len(sizes) == len(context.items)
    for found, expected, item in zip(tokens, output.pooler_output, context.items, strict=True):
        assert found.shape == expected.shape == (item.n_tokens, WIDTH)
        assert torch.equal(found.isnan().all(1), item.newline)
        assert torch.equal(found.nan_to_num(7.0), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", BATCHES)
def test_places_of_image_tokens(name: str, sizes: Any, encode: Any) -> None:
    _, context = encode(tiny_model(name), "image", *images(sizes))
    for size, item in zip(sizes, context.items, strict=True):
        expected = list(tokens_of(size, TILINGS[size]))
        assert item.n_tokens == len(expected)
        assert item.newline.tolist() == [place is None for place in expected]
        assert item.newlines == expected.count(None)
        found = torch.stack([item.crop, item.row, item.col], dim=1)
        assert found.tolist() == [list(place or (-1, -1, -1)) for place in expected]
        assert (item.kind, item.thumbnail, item.tiling) == ("image", 0, TILINGS[size])
        assert (item.n_crops, item.crop_grid) == (1 + TILINGS[size][0] * TILINGS[size][1], (GRID, GRID))
        assert item.grid is None


def test_a_map_without_rows_is_no_region(encode: Any) -> None:
    _, context = encode(tiny_model("llava-next"), "image", *images([(10, 400)]))
    (item,) = context.items
    assert (item.n_tokens, item.newlines, item.regions) == (GRID**2, 0, ((1, GRID, GRID),))


@pytest.mark.parametrize("size", list(TILINGS)[:-1])
def test_regions_are_the_thumbnail_and_the_unpadded_map(size: Any, encode: Any) -> None:
    _, context = encode(tiny_model("llava-next"), "image", *images([size]))
    (item,) = context.items
    overview, stitched = item.regions
    assert overview == (1, GRID, GRID)
    assert stitched[1] == item.newlines
    assert GRID**2 + stitched[1] * stitched[2] == item.n_tokens - item.newlines
    crop, row, col = (value[~item.newline][GRID**2 :].view(stitched[1:]) for value in (item.crop, item.row, item.col))
    high = (crop - 1) // TILINGS[size][1] * GRID + row
    wide = (crop - 1) % TILINGS[size][1] * GRID + col
    assert torch.equal(high.diff(dim=0), torch.ones_like(high[1:]))  # one raster: rows and columns count on
    assert torch.equal(wide.diff(dim=1), torch.ones_like(wide[:, 1:]))


def back(item: VisualItem) -> Tensor:
    """[crops, rows, columns] token number of every patch, -1 where it was cut off."""
    table = torch.full((item.n_crops, *item.crop_grid), -1)
    real = ~item.newline
    table[item.crop[real], item.row[real].long(), item.col[real].long()] = torch.arange(item.n_tokens)[real]
    return table


@pytest.mark.parametrize("size", TILINGS)
def test_patches_find_their_tokens(size: Any, encode: Any) -> None:
    _, context = encode(tiny_model("llava-next"), "image", *images([size]))
    (item,) = context.items
    table = back(item)
    tokens = table[table >= 0]
    assert len(tokens.unique()) == len(tokens) == item.n_tokens - item.newlines
    assert bool((table[item.thumbnail] == torch.arange(GRID**2).view(GRID, GRID)).all())
    number = torch.arange(table.numel()).view(item.n_crops, -1).float()
    (packed,) = context.to_tokens(with_class_token(number[..., None]))
    for patch, token in zip(table.flatten().tolist(), range(table.numel()), strict=True):
        assert patch < 0 or packed[patch, 0] == token


@pytest.mark.parametrize("name", NAMES)
def test_fingerprints_do_not_depend_on_the_batch(name: str, encode: Any) -> None:
    model, sizes = tiny_model(name), [(20, 50), (40, 50), (30, 70)]
    pixels, table = images(sizes)
    _, together = encode(model, "image", pixels, table)
    alone = []
    for image, size in zip(pixels, sizes, strict=True):
        count = 1 + TILINGS[size][0] * TILINGS[size][1]
        _, context = encode(model, "image", image[None, :count], torch.tensor([size]))
        alone += context.fingerprint.tolist()
    assert together.fingerprint.tolist() == alone
    assert len(set(alone)) == 3
    flat = torch.cat([image[: item.n_crops] for image, item in zip(pixels, together.items, strict=True)])
    assert encode(model, "image", flat, table)[1].fingerprint.tolist() == alone
    swapped = pixels.clone()
    swapped[1, [1, 2]] = pixels[1, [2, 1]]
    keys = encode(model, "image", swapped, table)[1].fingerprint.tolist()
    assert [a == b for a, b in zip(keys, alone, strict=True)] == [True, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_attention_reaches_the_tokens_of_its_patches(name: str, look: Any, encoder_attention: Any, limits: Any) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[2, "image", 3, "image"], [4, "image"]], seed=3, model=model)
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    layers = {1: Rows.CLS, 2: Rows.RECEIVED}
    view = look(model, inputs, layers)
    weights = encoder_attention(name, "image", inputs["pixel_values"], inputs["image_sizes"])
    expected = {1: weights[1][:, 0, 1:], 2: weights[2].mean(1)[:, 1:]}
    first = 0
    for index, size in enumerate(sizes):
        places = [place for place in tokens_of(size, TILINGS[size]) if place is not None]
        crop, row, col = torch.tensor(places).unbind(1)
        for layer in layers:
            found = view.vision_attention(layer)[index]
            wanted = expected[layer][first + crop, row * GRID + col]
            assert float((found[: len(places)] - wanted).abs().max()) <= limits.attention
            assert bool(found.isfinite().all())
        assert view.crop[index, : len(places)].tolist() == crop.tolist()
        assert [value[index, : len(places)].tolist() for value in view.place] == [row.tolist(), col.tolist()]
        first += 1 + TILINGS[size][0] * TILINGS[size][1]


# --- videos
def test_packing_of_videos_equals_the_models_own(encode: Any) -> None:
    model, projector = without_projector("llava-next-video")
    seen: list[Tensor] = []
    model.model.vision_resampler.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = torch.randn(2, 5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    output, context = encode(model, "video", pixels)
    tokens = context.to_tokens(with_class_token(seen[0]))
    assert projector.seen.shape == (10, 4, WIDTH)
    for found, expected, item in zip(tokens, output.pooler_output, context.items, strict=True):
        assert torch.equal(found, expected.reshape(-1, WIDTH))
        assert (item.n_tokens, item.newlines, item.grid, item.regions) == (20, 0, (5, 2, 2), ((5, 2, 2),))
        assert item.crop.tolist() == [frame for frame in range(5) for _ in range(4)]
        assert item.row.tolist() == [0.5, 0.5, 2.5, 2.5] * 5
        assert item.col.tolist() == [0.5, 2.5, 0.5, 2.5] * 5
        assert (item.n_crops, item.thumbnail, item.tiling) == (5, None, None)
    assert len(set(context.fingerprint.tolist())) == 2
    assert encode(model, "video", pixels[1:])[1].fingerprint[0] == context.fingerprint[1]


def test_attention_of_frames_is_pooled_like_their_features(look: Any, encoder_attention: Any, limits: Any) -> None:
    name = "llava-next-video"
    inputs = tiny_inputs(name, [[2, "video", 3], [4, "video"]], seed=3)
    view = look(tiny_model(name), inputs, {2: Rows.CLS})
    row = encoder_attention(name, "video", inputs["pixel_values_videos"])[2][:, 0, 1:]
    pooled = row.view(2, 3, 2, 2, 2, 2).mean((3, 5)).flatten(1)
    assert float((view.vision_attention(2) - pooled).abs().max()) <= limits.attention


# --- what runs and what is refused
@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_declares_its_family(name: str) -> None:
    adapter = adapters.of(tiny_model(name))
    assert adapter.family == TINY_MODELS[name].family == name
    assert adapter.modalities == TINY_MODELS[name].kinds
    assert adapter.placeholders == dict(zip(adapter.modalities, (120, 121), strict=False))
    spec = adapter.spec
    assert (spec.vision_layers, spec.feature_layer, spec.has_cls, spec.llm_layers) == (4, 2, True, 4)
    assert all(reference.family == name for reference in adapter.references)
    assert len(adapter.vision_layers) == len(adapter.vision_attention) == 4


def mistral(window: int | None) -> Any:
    from transformers import LlavaNextForConditionalGeneration, MistralConfig

    config = tiny_model("llava-next").config
    text = {key: getattr(config.text_config, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config.text_config = MistralConfig(
        **text, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, sliding_window=window
    )
    return LlavaNextForConditionalGeneration(config).eval()


def test_a_text_model_with_a_sliding_window_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"sliding_window=4096.*Load the checkpoint with sliding_window=None"):
        vtc.compress(mistral(4096), "random", retention=0.5)
    model = mistral(None)
    with vtc.compress(model, "random", retention=0.5) as handle, torch.no_grad():
        model(**tiny_inputs("llava-next", [[3, "image", 4]]))
    assert handle.stats.retention == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("mode", ["max", "conv"])
def test_a_resampler_that_is_no_average_is_refused(mode: str) -> None:
    from transformers import LlavaNextVideoForConditionalGeneration

    config = tiny_model("llava-next-video").config
    config.spatial_pool_mode = mode
    with pytest.raises(UnsupportedModel, match=f"spatial_pool_mode='{mode}' is not supported"):
        adapters.of(LlavaNextVideoForConditionalGeneration(config))
