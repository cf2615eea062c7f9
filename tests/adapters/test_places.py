"""Where tokens lie on the pixels: a picture whose colours are its coordinates, sent through every family's own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

import vtc
from vtc.adapters import of
from vtc.app import loading
from vtc.app.media import Video
from vtc.app.preparation import Chat, prepare
from vtc.app.show.look import Cell, look
from vtc.batch.places import places
from vtc.engine import entry
from vtc.errors import VTCError
from vtc.testing import tiny_model
from vtc.testing.processors import PROCESSED, tiny_processor

# The InternVL processor of transformers 5.17 hands a tensor to numpy.cumsum.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

SIZES = [(96, 96), (40, 88), (90, 45)]
"""Width and height of pictures."""


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, blue is what margins lack."""
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    return Image.fromarray((255 * np.stack([across, down, np.ones_like(down)], -1)).round().astype(np.uint8))


def patch_colours(model: Any, processor: Any, inputs: Any, kind: str) -> Tensor:
    """[crops, prefix + P, 3] or [P, 3] mean colour of every patch, in the order in which the encoder has them."""
    images = processor.video_processor if kind == "video" else processor.image_processor
    mean, std = (torch.tensor(each) for each in (images.image_mean, images.image_std))
    vision, adapter = model.config.vision_config, of(model)
    pixels = inputs["pixel_values_videos" if f"{kind}_grid_thw" in inputs and kind == "video" else "pixel_values"]
    if adapter.packed:
        patches = pixels.view(len(pixels), 3, -1)[:, :3].mean(2) * std + mean
        units = patches.view(-1, vision.spatial_merge_size**2, 3)
        if window := getattr(vision, "window_size", None):
            grids, merge = inputs[f"{kind}_grid_thw"], vision.spatial_merge_size
            units = units[get_vision_window_index(grids, merge, window, vision.patch_size)[0]]
        return units.flatten(0, 1)
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    pixels = pixels.flatten(0, -4)  # [crops, 3, H, W]
    pooled = torch.nn.functional.avg_pool2d(pixels, side).flatten(2).transpose(1, 2) * std + mean
    return torch.nn.functional.pad(pooled, (0, 0, int(adapter.spec.has_cls), 0))


def shown(name: str, monkeypatch: pytest.MonkeyPatch, *media: Any) -> tuple[Any, Any, Any, Any]:
    """Model, processor, inputs and the contexts that the engine matches to a prompt with `media`."""
    model, processor = tiny_model(name), tiny_processor(name)
    content = [{"type": "video" if isinstance(each, Video) else "image"} for each in media]
    content = [{**part, part["type"]: each} for part, each in zip(content, media, strict=True)]
    chat = Chat([{"role": "user", "content": [*content, {"type": "text", "text": "where?"}]}])
    inputs, sizes = prepare(loading.Loaded(name, "", model, processor), [chat])
    seen: list[Any] = []
    original = entry.find_items

    def watched(batch: Any, placeholders: Any, contexts: Any, *rest: Any) -> Any:
        seen.extend(contexts)
        return original(batch, placeholders, contexts, *rest)

    monkeypatch.setattr(entry, "find_items", watched)
    with vtc.compress(model, "stride", retention=0.5, processor=processor, image_sizes=sizes), torch.no_grad():
        model(**inputs)
    return model, processor, inputs, seen


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSED)
def test_a_token_lies_where_its_pixels_are(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    picture = ramp(*size)
    model, processor, inputs, (context,) = shown(name, monkeypatch, picture)
    (colours,) = context.to_tokens(patch_colours(model, processor, inputs, "image"))
    colours = colours[:, :2] / colours[:, 2:]
    (item,) = context.items
    found = places(item)
    on = found.panel >= 0
    assert torch.equal(on, ~item.newline)
    assert set(found.panel[on].tolist()) == set(range(len(found.panels)))
    box = found.box[on]
    assert ((box >= -1e-6) & (box <= 1 + 1e-6)).all()
    centre = (box[:, :2] + box[:, 2:]) / 2
    if name == "llava-clip":  # the centre of the picture is cut out
        width, height = size
        visible = torch.tensor([min(size) / width, min(size) / height])
        centre = (1 - visible) / 2 + centre * visible
    # Tokens at a margin that was added and cut off again are up to half a token from their pixels.
    assert ((centre - colours[on]).abs() <= 0.55 * (box[:, 2:] - box[:, :2]) + 0.02).all()
    assert (centre - colours[on]).abs().mean() < 0.04


@pytest.mark.parametrize("name", ["llava-onevision", "qwen2.5-vl", "internvl"])
def test_frames_are_panels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.stack([np.full((48, 48, 3), 40 * number, np.uint8) for number in range(6)])
    clip = Video(frames, np.arange(6) / 2, 2.0, 6)
    *_, (context,) = shown(name, monkeypatch, clip)
    (item,) = context.items
    found = places(item)
    assert found.panels[0] == "frame 1" and 6 % len(found.panels) == 0
    for number in range(len(found.panels)):
        box = found.box[found.panel == number]
        assert ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).sum().item() == pytest.approx(1, abs=1e-5)


def test_unknown_tilings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, (context,) = shown("internvl", monkeypatch, ramp(96, 40))
    item = context.items[0]
    assert item.tiling is not None
    object.__setattr__(item, "tiling", None)
    with pytest.raises(VTCError, match="pass processor= and image_sizes="):
        places(item)


@pytest.mark.parametrize("name", PROCESSED)
def test_marked_tokens_are_drawn_on_their_pixels(name: str) -> None:
    from vtc.app.show.paint import owners, paint, panels

    loaded = loading.Loaded(name, "", tiny_model(name), tiny_processor(name))
    seen = look(loaded, [ramp(80, 60)], "where?", [Cell("stride", vtc.create("stride"), 0.5)], max_new_tokens=1)
    ((_, (left,)),) = seen.seen[0].stages
    assert 0 < left.alive.sum() < len(left.alive)
    for number, (_, base) in enumerate(panels(seen, 0, 160)):
        owner = owners(seen.places[0], number, *base.shape[:2])
        assert (owner >= 0).all()
        drawn = np.asarray(paint(seen.places[0], left, number, base), np.float32)
        kept = left.alive[owner]
        assert np.abs(drawn - base)[kept].max(initial=0) <= 0.5
        assert (drawn.mean(2) < 0.3 * base.mean(2) + 1)[~kept].all()
