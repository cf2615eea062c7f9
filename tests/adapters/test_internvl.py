"""InternVL: pixel shuffle, images recovered from the prompt; against the model's own features."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc import adapters
from vtc.adapters.compat import EXPANDS_IN_ORDER
from vtc.batch.context import VisionContext
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import EncoderStage, Rows
from vtc.testing import FixedKeep, tiny_model
from vtc.testing.contract import against_oracle, generate
from vtc.testing.family import IMAGE, VISION_END, VISION_START
from vtc.testing.tiny_internvl import LINE, NUMBERS, PATCH, SIDE, TILE_TOKENS, _counted

NAME = "internvl"
GRID, TOKENS, WIDTH = SIDE // PATCH, SIDE // PATCH // 2, 32  # patches, tokens along a tile's side; encoder width


def tiles(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(*counts: int, marks: bool = True) -> list[int]:
    """Ids of a prompt with images of so many tiles, between the marks its processor writes or one behind the other."""
    ids = [5]
    for count in counts:
        run = [IMAGE] * (count * TILE_TOKENS)
        ids += [VISION_START, *run, VISION_END] if marks else run
    return [*ids, 6, 7]


def batch(*rows: list[int], pixels: Tensor) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


class Mean(nn.Module):
    """A projector that averages the patches that pixel shuffle put side by side, and remembers nothing else."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (4, -1)).mean(2)


@pytest.mark.parametrize("count", [1, 3])
def test_packing_equals_the_models_own(count: int, encode: Any) -> None:
    model = tiny_model(NAME)
    model.model.multi_modal_projector = Mean()
    seen: list[Tensor] = []
    model.model.vision_tower.layernorm.register_forward_hook(lambda module, args, output: seen.append(output))
    output, context = encode(model, "image", tiles(count))
    assert seen[0].shape == (count, 1 + GRID**2, WIDTH)
    tokens = context.to_tokens(seen[0])
    assert len(tokens) == count
    for found, expected in zip(tokens, output.pooler_output, strict=True):
        assert found.shape == (TILE_TOKENS, WIDTH)
        assert torch.equal(found, expected)


def test_other_tile_sizes_are_read_from_the_pixels(encode: Any) -> None:
    model = tiny_model(NAME)
    model.model.multi_modal_projector = Mean()
    output, context = encode(model, "image", torch.randn(2, 3, 2 * SIDE, 2 * SIDE))
    assert [item.grid for item in context.items] == [(1, 2 * TOKENS, 2 * TOKENS)] * 2
    assert output.pooler_output.shape[1] == context.items[0].n_tokens


def test_a_tile_before_the_prompt_is_known(encode: Any) -> None:
    _, context = encode(tiny_model(NAME), "image", tiles(2))
    for item in context.items:
        assert (item.n_tokens, item.grid, item.crop_grid) == (TILE_TOKENS, (1, TOKENS, TOKENS), (GRID, GRID))
        places = [[2 * row + 0.5, 2 * col + 0.5] for row in range(TOKENS) for col in range(TOKENS)]
        assert torch.stack([item.row, item.col], dim=1).tolist() == places


# --- images from runs of placeholders
ROWS = [[3, 1], [], [5], [1, 1, 2]]
PER_ROW = [sum(row) for row in ROWS]


def context_of_batch(encode: Any, attention: bool = False) -> tuple[VisionContext, Tensor]:
    """Tiles of ROWS as encoded, and the placeholder mask of their prompts."""
    _, context = encode(tiny_model(NAME), "image", tiles(sum(PER_ROW)))
    if attention:
        context.attention = {(2, Rows.CLS): torch.arange(sum(PER_ROW) * TILE_TOKENS).float().view(-1, TILE_TOKENS)}
        gone = torch.arange(TILE_TOKENS) % 3 == 0
        counts = [int((~gone).sum())] * sum(PER_ROW)
        context.alive = (~gone).expand(sum(PER_ROW), -1), tuple(counts)
    inputs = batch(*(prompt(*row) for row in ROWS), pixels=torch.empty(0))
    return context, inputs["input_ids"] == IMAGE


@pytest.mark.parametrize("expand", [1, 3])
def test_runs_of_placeholders_become_images(expand: int, encode: Any) -> None:
    context, mask = context_of_batch(encode)
    adapter = adapters.of(tiny_model(NAME))
    (joined,) = adapter.regroup((context,), mask.repeat_interleave(expand, 0)[None])
    assert [item.n_crops for item in joined.items] == [count for row in ROWS for count in row]
    for item in joined.items:
        count = item.n_crops
        assert item.n_tokens == count * TILE_TOKENS
        assert item.crop.tolist() == [tile for tile in range(count) for _ in range(TILE_TOKENS)]
        assert item.row.tolist() == context.items[0].row.tolist() * count
        assert item.col.tolist() == context.items[0].col.tolist() * count
        assert item.thumbnail == (count - 1 if count > 1 else None)
        assert (item.tiling, item.newlines, item.regions) == (None, 0, ((count, TOKENS, TOKENS),))
    assert len(context.items) == sum(PER_ROW)  # what hangs on the encoder's output stays as it was


def test_what_belongs_to_tiles_is_joined(encode: Any) -> None:
    context, mask = context_of_batch(encode, attention=True)
    (joined,) = adapters.of(tiny_model(NAME)).regroup((context,), mask[None])
    counts = [count for row in ROWS for count in row]
    values = torch.randn(sum(counts), 1 + GRID**2, 2)
    parts = context.to_tokens(values)
    first = 0
    assert joined.alive is not None
    for index, (count, tokens) in enumerate(zip(counts, joined.to_tokens(values), strict=True)):
        mine, width = slice(first, first + count), count * TILE_TOKENS
        assert torch.equal(tokens, torch.cat(parts[mine]))
        assert torch.equal(joined.attention[2, Rows.CLS][index, :width], context.attention[2, Rows.CLS][mine].flatten())
        assert torch.equal(joined.alive[0][index, :width], context.alive[0][mine].flatten())
        assert not joined.alive[0][index, width:].any()
        assert joined.alive[1][index] == int(joined.alive[0][index].sum())
        first += count
    assert joined.attention[2, Rows.CLS].shape == (len(counts), 5 * TILE_TOKENS)


def test_fingerprints_do_not_depend_on_the_batch(encode: Any) -> None:
    model, parts = tiny_model(NAME), [tiles(3, 1), tiles(1, 2), tiles(2, 3)]
    adapter = adapters.of(model)

    def keys(images: list[Tensor], rows: list[list[int]]) -> list[int]:
        _, context = encode(model, "image", torch.cat(images))
        mask = batch(*rows, pixels=images[0])["input_ids"] == IMAGE
        return adapter.regroup((context,), mask[None])[0].fingerprint.tolist()

    together = keys(parts, [prompt(3, 1), prompt(2)])
    assert together == [key for part in parts for key in keys([part], [prompt(len(part))])]
    assert len(set(together)) == 3
    assert keys([parts[0].flip(0)], [prompt(3)])[0] not in together


def test_images_without_marks_between_them_are_one_item() -> None:
    model = tiny_model(NAME)
    inputs = batch(prompt(2, 1, marks=False), pixels=tiles(3))
    handle = vtc.compress(model, "random", retention=0.5)
    generate(model, inputs, handle, 1)
    assert [len(item.positions) for item in handle.trace[0].items] == [3 * TILE_TOKENS]


def test_a_run_that_is_no_whole_number_of_tiles_is_refused() -> None:
    ids = prompt(2)
    ids.insert(2 + TILE_TOKENS // 2, 9)
    model, message = tiny_model(NAME), r"no multiple of the 16 tokens of a tile \(\[8, 24\]\)"
    with vtc.compress(model, "random", retention=0.5), pytest.raises(UnsupportedCall, match=message):
        model(**batch(ids, pixels=tiles(2)))


def test_placeholders_that_were_not_encoded_are_refused() -> None:
    model = tiny_model(NAME)
    context = VisionContext("image", [], torch.empty(0), lambda values: [])
    mask = torch.ones(1, 1, TILE_TOKENS, dtype=torch.bool)
    assert adapters.of(model).regroup((context,), mask) == (context,)  # left to the engine's own check
    assert adapters.of(model).regroup((), mask) == ()


# --- methods
def test_attention_of_the_class_token_reaches_its_tokens(look: Any, encoder_attention: Any, limits: Any) -> None:
    model = tiny_model(NAME)
    inputs = batch(prompt(3, 1), prompt(2), pixels=tiles(6))
    view = look(model, inputs, {2: Rows.CLS, 3: Rows.RECEIVED})
    weights = encoder_attention(NAME, "image", inputs["pixel_values"])
    for layer, rows in ((2, weights[2][:, 0, 1:]), (3, weights[3].mean(1)[:, 1:])):
        pooled = rows.view(6, TOKENS, 2, TOKENS, 2).mean((2, 4)).flatten(1)
        found = view.vision_attention(layer)
        for index, (first, count) in enumerate(((0, 3), (3, 1), (4, 2))):
            expected = pooled[first : first + count].flatten()
            assert float((found[index, : len(expected)] - expected).abs().max()) <= limits.attention


@pytest.mark.parametrize("method", ["random", "vtc_cls", "stride", "pool"])
def test_the_budget_of_an_image_is_spread_over_its_tiles(method: str) -> None:
    model = tiny_model(NAME)
    inputs = batch(prompt(3, 1), prompt(2), [5, 6], pixels=tiles(6))
    handle = vtc.compress(model, method, keep=12)
    generate(model, inputs, handle, 1)
    for item, count in zip(handle.trace[0].items, (3, 1, 2), strict=True):
        per_tile = item.map().sum((1, 2)).tolist()
        assert sum(per_tile) <= 12
        if method in ("random", "vtc_cls"):
            assert per_tile == [12 // count] * count
        if method == "pool":
            assert len(set(per_tile)) == 1
    assert handle.stats.calls[0].visual_tokens_in == (4 * TILE_TOKENS, 2 * TILE_TOKENS, 0)


@pytest.mark.parametrize("counted", [True, False])
def test_frames_that_the_processor_counts_are_one_video(counted: bool, limits: Any) -> None:
    model = tiny_model(NAME)
    inputs = video_batch([4]) if counted else batch(prompt(1, 1, 1, 1), pixels=tiles(4))
    handle = vtc.compress(model, "random", keep=5)
    generate(model, inputs, handle, 1)
    found = [(item.kind, item.grid, len(item.kept[0])) for item in handle.trace[0].items]
    frame = (TOKENS, TOKENS)
    assert found == ([("video", (4, *frame), 5)] if counted else [("image", (1, *frame), 5)] * 4)
    attach = lambda model: vtc.compress(model, "vtc_cls", retention=0.3)  # noqa: E731
    assert against_oracle(model, inputs, attach, 4) <= limits.logits


def video_batch(*rows: list[int]) -> dict[str, Tensor]:
    """One prompt per row: 5, then videos of so many frames with text between any two, then 6 and 7."""
    prompts = []
    for row in rows:
        ids = [5]
        for count in row:
            for frame in range(1, count + 1):
                ids += [LINE, *_counted(frame), *[IMAGE] * TILE_TOKENS, VISION_END]
        prompts.append([*ids, 6, 7])
    return batch(*prompts, pixels=tiles(sum(map(sum, rows))))


def test_where_a_video_ends() -> None:
    """At the next frame 1, at an image between frames, and where the count does not go on."""
    model = tiny_model(NAME)
    inputs = video_batch([3, 2], [], [1, 4])
    with vtc.compress(model, "random", keep=6) as handle, torch.no_grad():
        model(**inputs)
    kinds = [(item.row, item.kind, item.layout.n_crops) for item in handle.trace[0].items]
    assert kinds == [(0, "video", 3), (0, "video", 2), (2, "image", 1), (2, "video", 4)]
    second = (inputs["input_ids"][0] == NUMBERS + 2).nonzero()[0]
    inputs["input_ids"][0, second] = NUMBERS + 7
    with vtc.compress(model, "random", keep=6) as handle, torch.no_grad():
        model(**inputs)
    assert [(item.row, item.layout.n_crops) for item in handle.trace[0].items][:4] == [(0, 1), (0, 1), (0, 1), (0, 2)]
    big = [LINE, *_counted(2), *[IMAGE] * (3 * TILE_TOKENS), VISION_END]
    ids = [5, *prompt(1)[1:-2], *big, 6]
    with vtc.compress(model, "random", keep=6) as handle, torch.no_grad():
        model(**batch(ids, pixels=tiles(4)))
    assert [(item.kind, item.layout.n_crops) for item in handle.trace[0].items] == [("image", 1), ("image", 3)]


def test_embeddings_do_not_tell_frames_from_images() -> None:
    model = tiny_model(NAME)
    for inputs, refused in ((video_batch([2]), True), (batch(prompt(1, 1, 3), pixels=tiles(5)), False)):
        ids = inputs.pop("input_ids")
        rows = model.get_input_embeddings()(ids)
        with vtc.compress(model, "random", keep=6) as handle, torch.no_grad():
            if refused:
                with pytest.raises(UnsupportedCall, match="pass input_ids instead of inputs_embeds"):
                    model(inputs_embeds=rows, **inputs)
            else:
                model(inputs_embeds=rows, **inputs)
                assert len(handle.trace[0].items) == 3


@pytest.mark.skipif(not EXPANDS_IN_ORDER, reason="transformers < 5.20 gives the tiles to the wrong beams")
def test_beams_share_the_videos_of_their_prompt() -> None:
    model = tiny_model(NAME)
    handle = vtc.compress(model, FixedKeep(at=(0,)))
    generate(model, video_batch([2, 3], [4]), handle, 2, num_beams=2)
    assert [(item.row, item.layout.n_crops) for item in handle.trace[0].items] == [
        (0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 4)
    ]  # fmt: skip


@pytest.mark.skipif(not EXPANDS_IN_ORDER, reason="transformers < 5.20 gives the tiles to the wrong beams")
def test_beams_share_the_images_of_their_prompt(limits: Any) -> None:
    model = tiny_model(NAME)
    inputs = batch(prompt(3, 1), prompt(2), [5, 6], pixels=tiles(6))
    handle = vtc.compress(model, FixedKeep(at=(0,)))
    generate(model, inputs, handle, 2, num_beams=3)
    items = handle.trace[0].items
    assert [item.row for item in items] == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert [len(item.positions) // TILE_TOKENS for item in items] == [3, 1, 3, 1, 3, 1, 2, 2, 2]
    assert all(torch.equal(items[0].kept[0], other.kept[0]) for other in (items[2], items[4]))


def test_the_adapter_declares_its_family() -> None:
    model = tiny_model(NAME)
    adapter = adapters.of(model)
    assert (adapter.family, adapter.modalities) == (NAME, ("image", "video"))
    assert adapter.placeholders == {"image": IMAGE}  # frames come as images
    spec = adapter.spec
    assert (spec.vision_layers, spec.feature_layer, spec.has_cls, spec.llm_layers) == (4, 3, True, 4)
    model.config.vision_feature_layer = 2
    assert adapters.of(model).spec.feature_layer == 1
    assert all(reference.family == NAME for reference in adapter.references)


def test_stages_inside_the_encoder_need_the_last_layer() -> None:
    model = tiny_model(NAME)
    assert adapters.of(model).spec.encoder_stages
    model.config.vision_feature_layer = 2
    assert not adapters.of(model).spec.encoder_stages
    with pytest.raises(UnsupportedMethod, match="does not allow: its features are those of several layers or of an"):
        vtc.compress(model, dataclasses.replace(FixedKeep(), at=(EncoderStage(1),)))
