"""The pictures of the embedded benchmark are the same everywhere and show what their description says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vtc.errors import UnknownName
from vtc.eval.tiny.canvas import PALETTE, Item
from vtc.eval.tiny.glyphs import TRAIN_DIGITS, draw_digit
from vtc.eval.tiny.scenes import GRID, PATCH, SIZE, SPLITS, Scene, make_scene
from vtc.eval.tiny.targets import PRESENCE_BITS, patch_targets, presence

DIGESTS = {
    ("train", 0): "f33372e29d0cf177bdfb5680c836f9c22a522067a89e3b1767c79025027ce960",
    ("check", 1): "daec8d4482153f806f1323c1c6d215e9936818d6629968f20dcba292a03ffc61",
    ("benchmark", 0): "243745c08acd2f6d5ea3f96fdb5c46863b17983fcff275a051b511e84777080d",
    ("benchmark", 1): "bb2aba8b15596b7b253b3c7698a7d0f27e7b26a83c922a85de38757c61feb969",
    ("benchmark", 7): "034d4dd7f628aee78701326603619cb6ae1ec5ee433f3b124463bd54c263c220",
}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed, "check") for seed in range(200)]


@pytest.mark.parametrize(("split", "seed"), DIGESTS)
def test_pixels_are_those_of_the_committed_digest(split: str, seed: int) -> None:
    image = make_scene(seed, split).image
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest() == DIGESTS[split, seed]


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="benchmark"):
        make_scene(0, "test")


def test_splits_and_seeds_give_different_pictures() -> None:
    pictures = {make_scene(seed, split).image.tobytes() for seed in range(3) for split in SPLITS}
    assert len(pictures) == 9


def test_things_lie_inside_the_picture_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        boxes = np.array([item.box for item in scene.items])
        assert boxes.min() >= 0 and boxes.max() <= SIZE
        for index, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[index + 1 :]:
                apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
                assert apart, scene.items


def _seen_colour(scene: Scene, item: Item) -> str:
    """Nearest palette colour of the middle of a shape, measured on the picture."""
    x, y = (int(value) for value in item.centre)
    patch = scene.image[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).astype(float).mean(0)
    return min(PALETTE, key=lambda name: float(np.abs(np.array(PALETTE[name]) - patch).sum()))


def test_shapes_have_their_colour_on_the_picture(scenes: list[Scene]) -> None:
    filled = [(s, i) for s in scenes for i in s.items if i.kind == "shape" and i.name != "ring"]
    assert len(filled) > 300
    assert all(_seen_colour(scene, item) == item.colour for scene, item in filled)


def test_every_kind_of_thing_occurs_and_some_are_missing(scenes: list[Scene]) -> None:
    for kind in ("digit", "word"):
        share = np.mean([any(item.kind == kind for item in scene.items) for scene in scenes])
        assert 0.4 < share < 0.7, (kind, share)
    assert {sum(item.kind == "shape" for item in scene.items) for scene in scenes} >= {1, 2, 3, 4, 5, 6}


def test_training_and_held_out_digits_are_different_images() -> None:
    rng = np.random.default_rng(0)
    train = {draw_digit(rng, True)[0].tobytes() for _ in range(8 * TRAIN_DIGITS)}
    held_out = {draw_digit(rng, False)[0].tobytes() for _ in range(4000)}
    assert len(train) > 1300 and len(held_out) > 380 and not train & held_out


def test_targets_name_the_patch_in_the_middle_of_every_thing(scenes: list[Scene]) -> None:
    for scene in scenes[:50]:
        targets = patch_targets(scene.items).reshape(5, GRID, GRID)
        for item in scene.items:
            column, row = (int(value // PATCH) for value in item.centre)
            assert targets[4, row, column] == (1 if item.kind == "shape" else 2)
            assert (targets[1, row, column] > 0) == (item.kind == "shape")
            assert (targets[2, row, column] > 0) == (item.kind == "digit")
            assert (targets[3, row, column] > 0) == (item.kind == "word")
        bits = presence(scene.items)
        assert bits.shape == (PRESENCE_BITS,)
        assert bits.sum() == len({(item.kind, item.name, item.colour) for item in scene.items})
