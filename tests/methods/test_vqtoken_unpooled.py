"""Both forms of VQToken on what the projector made of a video's patches, ahead of the pooling to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtc
from vtc.errors import UnsupportedCall, UnsupportedMethod
from vtc.method.base import Selection, StageView
from vtc.methods.vqtoken import VQToken, VQTokenCodebook
from vtc.testing import tiny_inputs, tiny_model

FAMILY = "llava-onevision"
ROWS: list[list[Any]] = [[3, "video", 4], [2, "image", 5]]


@dataclass(frozen=True)
class Watched(VQTokenCodebook):
    """Keeps what it saw and answered."""

    pooled: bool = False
    seen: Any = None

    def select(self, view: StageView) -> Selection | None:
        selection = super().select(view)
        self.seen.append((view, selection))
        return selection


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(FAMILY)


def projected(model: Any, pixels: Tensor) -> Tensor:
    """[frames, P, D] by hand."""
    made: list[Tensor] = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: made.append(output))
    with torch.no_grad():
        model.model.get_video_features(pixels)
    hook.remove()
    return made[0]


def logits(model: Any, method: Any, inputs: Any, **budget: Any) -> Tensor:
    with vtc.compress(model, method, **budget), torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def test_a_video_shows_the_patches_ahead_of_its_pooling_and_a_picture_its_tokens(model: Any) -> None:
    inputs, seen = tiny_inputs(FAMILY, ROWS, model=model), []
    logits(model, Watched(seen=seen), inputs, keep=5)
    view, _ = seen[0]
    frames = projected(model, inputs["pixel_values_videos"])
    count, per_frame, side = len(frames), frames.shape[1], int(frames.shape[1] ** 0.5)
    video, image = (next(n for n, each in enumerate(view.items.layouts) if each.kind == k) for k in ("video", "image"))
    patches = view.patches
    assert patches.pooled[video] and not patches.pooled[image]
    assert torch.equal(patches.rows[video][patches.mask[video]], frames.flatten(0, 1))
    assert patches.number[video][patches.mask[video]].tolist() == list(range(count * per_frame))
    assert patches.regions[video] == ((count, side, side),)
    own = view.items.mask[image]
    assert torch.equal(patches.rows[image][: len(own)][own], view.tokens[image][own])
    assert patches.regions[image] == view.items.layouts[image].regions
    # the middle of a token's patches is one that its mean was taken over
    layout, middle = view.items.layouts[video], patches.middle[video]
    row, col = middle % per_frame // side, middle % side
    held = slice(0, view.items.counts[video])
    assert torch.equal((middle // per_frame)[held], layout.crop[held])
    assert float((row[held] - layout.row[held]).abs().max()) <= 1
    assert float((col[held] - layout.col[held]).abs().max()) <= 1


def test_every_row_is_the_mean_of_the_patches_of_its_cluster(model: Any) -> None:
    inputs, seen = tiny_inputs(FAMILY, [[3, "video", 4]], model=model), []
    logits(model, Watched(seen=seen), inputs, keep=6)
    view, selection = seen[0]
    labels, counts, _ = Watched(seen=[]).assign(view)
    assert counts.tolist() == [5]  # one of six is the newline
    rows = projected(model, inputs["pixel_values_videos"]).flatten(0, 1)
    first = sorted(range(5), key=lambda number: int((labels[0] == number).nonzero()[0]))
    means = torch.stack([rows[labels[0] == number].mean(0) for number in first])
    assert selection.keep[0].nonzero()[:, 0].tolist() == list(range(5))
    assert torch.allclose(selection.tokens[0, :5], means, atol=1e-5)
    into = [first.index(int(labels[0, patch])) for patch in view.patches.middle[0]]
    assert selection.merged_into[0].tolist() == into


def test_a_batch_is_its_rows_alone(model: Any) -> None:
    both = logits(model, "vqtoken_codebook", tiny_inputs(FAMILY, ROWS, model=model), keep=5, pooled=False)
    for number in range(len(ROWS)):
        row = tiny_inputs(FAMILY, ROWS, only=number, model=model)
        alone = logits(model, "vqtoken_codebook", row, keep=5, pooled=False)
        assert float((both[number, -1] - alone[0, -1]).abs().max()) < 1e-5


def test_clusters_of_patches_are_not_clusters_of_tokens(model: Any) -> None:
    inputs = tiny_inputs(FAMILY, [[3, "video", 4]], model=model)
    with_tokens, with_patches = (logits(model, "vqtoken_codebook", inputs, keep=5, pooled=p) for p in (True, False))
    assert float((with_tokens - with_patches).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["llava-clip", "llava-next-video", "qwen2.5-vl", "internvl"])
def test_families_that_pool_nothing_behind_their_projector_have_their_tokens(family: str) -> None:
    model = tiny_model(family)
    kind = "video" if family == "llava-next-video" else "image"
    inputs = tiny_inputs(family, [[3, kind, 4]], model=model)
    with_tokens, with_patches = (logits(model, "vqtoken_codebook", inputs, keep=5, pooled=p) for p in (True, False))
    assert torch.equal(with_tokens, with_patches)


def test_the_block_reads_frames_of_patches_without_resampling(model: Any) -> None:
    inputs = tiny_inputs(FAMILY, [[3, "video", 4]], model=model)
    side = int(projected(model, inputs["pixel_values_videos"]).shape[1] ** 0.5)
    method = VQToken(grid=(side, side), pooled=False, training=True, heads=4, inner=8, dropout=0.0)
    with vtc.compress(model, method, keep=9) as handle:
        output = model(**inputs)
        output.logits.square().mean().backward()
        module: nn.Module = handle.module
        assert all(float(weight.grad.abs().max()) > 0 for name, weight in module.named_parameters() if "norm3" in name)
    assert method.settings(vtc.adapters.of(model).spec)["pooled"] == "false"
    assert "pooled" not in VQToken(training=True).settings(vtc.adapters.of(model).spec)
    with (
        vtc.compress(model, VQToken(grid=(side, side), training=True, heads=4, inner=8), keep=9),
        pytest.raises(UnsupportedMethod, match=rf"reads maps of {side}x{side} tokens.*pass resample=True"),
    ):
        model(**inputs)


def test_shared_encoders_keep_the_patches_of_those_that_are_named(model: Any) -> None:
    inputs = tiny_inputs(FAMILY, [[3, "video", 4]], model=model)
    method = VQTokenCodebook(pooled=False)
    alone = logits(model, method, inputs, keep=5)
    with vtc.share_encoder(model, [method, vtc.create("random")]):
        assert torch.equal(logits(model, method, inputs, keep=5), alone)
        assert torch.equal(logits(model, method, inputs, keep=5), alone)
    with (
        vtc.share_encoder(model, [vtc.create("random")]),
        pytest.raises(UnsupportedCall, match="without what the projector made of patches; name every method"),
    ):
        logits(model, method, inputs, keep=5)


def test_nothing_stays_on_the_projector(model: Any) -> None:
    projector = model.model.multi_modal_projector
    with vtc.compress(model, VQTokenCodebook(pooled=False), keep=5):
        assert len(projector._forward_hooks) == 1
    assert not projector._forward_hooks
