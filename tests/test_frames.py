"""Items frame by frame, on made-up views and on what the families describe."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtc
from vtc.method.base import Compressor, Selection, StageView
from vtc.method.frames import Frames
from vtc.testing import TINY_MODELS, Shape, make_view, tiny_inputs, tiny_model

CLIP = Shape(((3, 2, 4),), kind="video")
TILED = Shape(((1, 3, 3), (2, 4, 2)))
VIDEOS = [name for name, family in TINY_MODELS.items() if "video" in family.kinds]


@pytest.mark.parametrize("shapes", [[CLIP, (3, 5)], [(3, 5), TILED], [CLIP, TILED, Shape(((5, 1, 2),), kind="video")]])
def test_pictures_are_videos_of_one_frame(shapes: list[object]) -> None:
    view = make_view(shapes)
    frames = Frames.of(view)
    expected = []
    for shape in shapes:
        video = isinstance(shape, Shape) and shape.kind == "video"
        item = shape.item() if isinstance(shape, Shape) else None
        sizes = list(item.crop_sizes) if item and video else [item.n_tokens if item else 15]
        expected.append(sizes + [0] * (frames.most - len(sizes)))
    assert frames.sizes.tolist() == expected
    assert frames.width == max(map(max, expected))
    for item, row in enumerate(expected):
        numbers = [f for f, size in enumerate(row) for _ in range(size)]
        assert frames.number[item, : len(numbers)].tolist() == numbers
    rows = frames.parts.take(view.tokens)
    assert torch.equal(frames.parts.give(rows)[view.items.mask], view.tokens[view.items.mask])
    for part, size in enumerate(frames.sizes.flatten().tolist()):
        mean = rows[part, :size].double().mean(0) if size else torch.zeros(rows.shape[2]).double()
        assert torch.allclose(frames.mean(rows)[part].double(), mean, atol=1e-6)


def test_the_same_place_in_an_earlier_frame() -> None:
    view = make_view([CLIP, TILED])
    frames = Frames.of(view)
    for lag in (1, 2):
        found = frames.earlier(torch.full_like(frames.number, lag))
        assert found[0, :24].tolist() == [-1] * 8 * lag + list(range(24 - 8 * lag))
        assert found[1].eq(-1).all()


def test_tokens_that_have_left_are_no_earlier_ones() -> None:
    view = make_view([CLIP, (2, 2)])
    keep = view.items.mask & (view.items.token != 3) & (view.items.token != 9)
    counts = keep.sum(1).tolist()
    moved = torch.arange(view.visual.shape[1]).expand_as(view.visual)
    items = view.items.kept(keep, counts, moved)
    frames = Frames.of(dataclasses.replace(view, items=items))
    found = frames.earlier(torch.ones_like(frames.number))
    left = [n for n in range(24) if n not in (3, 9)]
    assert found[0].tolist() == [left.index(n - 8) if n - 8 in left else -1 for n in left]


@dataclasses.dataclass(frozen=True)
class Looks(Compressor):
    """Keeps everything and notes what it sees."""

    needs_budget = False

    def select(self, view: StageView) -> Selection | None:
        SEEN.append(view)
        return None


SEEN: list[StageView] = []


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_of_the_families_have_equal_places(name: str) -> None:
    model = tiny_model(name)
    SEEN.clear()
    with torch.no_grad(), vtc.compress(model, Looks()):
        model(**tiny_inputs(name, [[3, "video", 5, "video", 2], [4, "video", 6]], model=model))
    (view,) = SEEN
    frames = Frames.of(view)
    found = frames.earlier(torch.ones_like(frames.number))
    for item, layout in enumerate(view.items.layouts):
        count, size = view.items.counts[item], view.items.counts[item] // layout.n_crops
        assert layout.kind == "video" and layout.n_crops > 1
        assert found[item, :count].tolist() == [-1] * size + list(range(count - size))
