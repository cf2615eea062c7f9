"""Old versions of transformers: the order of images under beams, and other names of arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.adapters import compat
from vtc.batch.context import VisionContext
from vtc.errors import UnsupportedCall
from vtc.method.layout import VisualItem
from vtc.testing import tiny_inputs, tiny_model

TOKENS = 4


def encoded(keys: list[int]) -> VisionContext:
    """A context of images of four tokens with these fingerprints."""
    place = torch.arange(TOKENS)
    item = VisualItem("image", TOKENS, place * 0, place, place, place < 0, 1, (2, 2))
    return VisionContext("image", [item] * len(keys), torch.tensor(keys), lambda values: [])


def rows(*images: int) -> Tensor:
    """Placeholders of a batch whose rows hold so many images."""
    mask = torch.zeros(len(images), 3 * TOKENS + 1, dtype=torch.bool)
    for row, count in zip(mask, images, strict=True):
        row[1 : 1 + count * TOKENS] = True
    return mask


A, B, C = 11, 22, 33
WRONG = [
    ([A, A, B, B], (2, 2)),  # one prompt with two images, two beams
    ([A, A, A, B, B, B], (2, 2, 2)),
    ([A, A, B, B, C, C], (2, 2, 1, 1)),  # two prompts, of which one holds two images
    ([C, C, A, A, B, B], (1, 1, 2, 2)),
    ([A, A, A, A, B, B, B, B], (2, 2, 2, 2)),
]
RIGHT = [
    ([A, B], (1, 1)),  # no expansion
    ([A, A, B, B], (1, 1, 1, 1)),  # one image per prompt, two beams
    ([A, A, A, B, B, B], (1, 1, 1, 0, 0, 0)),  # more encoded than placed: the engine refuses that
    ([A, B, A, B], (2, 2)),  # two equal prompts
    ([A, B, C, A], (2, 2)),
    ([A, A, A, A], (2, 2)),  # the order of equal images does not matter
    ([A, A], (1, 0, 1, 0)),
    ([A], (1, 0)),
    ([], (0,)),
]


@pytest.mark.parametrize(("keys", "images"), WRONG)
def test_images_of_the_wrong_beam_are_refused(keys: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "EXPANDS_IN_ORDER", False)
    with pytest.raises(UnsupportedCall, match=r"images of one prompt to the wrong beams.*use transformers 5\.20"):
        compat.refuse_wrong_order(encoded(keys), rows(*images))


@pytest.mark.parametrize(("keys", "images"), RIGHT)
def test_the_right_order_passes(keys: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "EXPANDS_IN_ORDER", False)
    compat.refuse_wrong_order(encoded(keys), rows(*images))


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "llava-next-video", "llava-onevision", "internvl"])
def test_the_families_ask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels repeated one by one, as an old generate() hands them to forward()."""
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[3, "image", 4, "image"]], seed=1, model=model)
    repeated = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
    with vtc.compress(model, "random", retention=0.5) as handle, torch.no_grad():
        model(**inputs)
        monkeypatch.setattr(compat, "EXPANDS_IN_ORDER", False)
        model(**inputs)
        with pytest.raises(UnsupportedCall, match="wrong beams"):
            model(**repeated)
    assert len(handle.stats.calls) == 2


@pytest.mark.skipif(compat.EXPANDS_IN_ORDER, reason="this version repeats the images of a prompt as a group")
@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "llava-onevision", "internvl"])
def test_generate_of_an_old_version_is_refused(name: str) -> None:
    model = tiny_model(name)
    inputs = tiny_inputs(name, [[3, "image", 4, "image"], [2, "image"]], seed=1, model=model)
    with vtc.compress(model, "random", retention=0.5):
        model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(UnsupportedCall, match="wrong beams"):
            model.generate(**inputs, max_new_tokens=2, num_beams=2)


def test_pixels_of_a_video_by_either_name() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    assert compat.media("video", {"pixel_values": old}) is old
    assert compat.media("video", {"pixel_values_videos": new}) is new
    assert compat.media("image", {"pixel_values": old, "pixel_values_videos": new}) is old


def test_every_class_is_registered_with_its_adapter() -> None:
    for target in set(adapters.FAMILIES.values()):
        cls = adapters.load(target)
        assert {name for name, value in adapters.FAMILIES.items() if value == target} == set(cls.model_classes)
        assert set(cls.modalities) <= {"image", "video"}
        assert cls.references
