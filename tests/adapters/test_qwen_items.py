"""Qwen-VL items: what a description says equals what the model does with its own features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import vtc
from vtc import adapters
from vtc.batch.context import VisionContext
from vtc.engine.encoder import VisionRecorder, context_of
from vtc.errors import UnsupportedMethod, UnsupportedModel
from vtc.method.base import Needs, Rows
from vtc.testing import tiny_model
from vtc.testing.tiny_qwen import CHANNELS, MERGE, PAIR, PATCH

NAMES = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
IMAGES = [[(1, 8, 6)], [(1, 4, 4), (1, 12, 8), (1, 4, 14), (1, 2, 2)], [(1, 6, 6), (1, 6, 6), (1, 10, 4)]]
VIDEOS = [[(3, 4, 6)], [(1, 8, 8), (2, 6, 10), (5, 2, 4)]]
CASES = [("image", grids) for grids in IMAGES] + [("video", grids) for grids in VIDEOS]
WIDTH = CHANNELS * PAIR * PATCH**2


class MeanMerger(nn.Module):
    """A merger without weights, which remembers what came in: [P, C] -> [P / 4, C]."""

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen = hidden
        return hidden.view(-1, MERGE**2, hidden.shape[-1]).mean(1)


def pixels(grids: list[tuple[int, int, int]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t * h * w, WIDTH, generator=generator) for t, h, w in grids]


@torch.no_grad()
def encode(model: Any, kind: str, grids: list[tuple[int, int, int]], parts: list[Tensor] | None = None) -> Any:
    """Output of the model's own feature method, with the description attached."""
    recorder = VisionRecorder(adapters.of(model), Needs())
    recorder.install()
    try:
        function = getattr(model.model, f"get_{kind}_features")
        return function(torch.cat(parts or pixels(grids)), torch.tensor(grids), return_dict=True)
    finally:
        recorder.remove()


def described(model: Any, kind: str, grids: list[tuple[int, int, int]], parts: list[Tensor] | None = None) -> Any:
    context = context_of(encode(model, kind, grids, parts))
    assert isinstance(context, VisionContext)
    return context


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "grids"), CASES)
def test_packing_equals_the_models_own(name: str, kind: str, grids: Any) -> None:
    model = tiny_model(name)
    model.model.visual.merger = merger = MeanMerger()
    output = encode(model, kind, grids)
    context = context_of(output)
    assert context is not None
    for values in (merger.seen, merger.seen[None]):
        tokens = context.to_tokens(values)
        assert [token.shape[0] for token in tokens] == [item.n_tokens for item in context.items]
        for found, expected in zip(tokens, output.pooler_output, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_window_order_is_what_has_to_be_undone(name: str) -> None:
    model = tiny_model(name)
    model.model.visual.merger = merger = MeanMerger()
    output = encode(model, "image", [(1, 8, 6), (1, 6, 10)])
    plain = merger.seen.view(-1, MERGE**2, merger.seen.shape[-1]).mean(1)
    assert torch.equal(plain, torch.cat(output.pooler_output)) == (name != "qwen2.5-vl")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "grids"), CASES)
def test_geometry_equals_the_models_position_ids(name: str, kind: str, grids: Any) -> None:
    """Frame, row and column of every patch, pushed through to_tokens, give the geometry of the items."""
    model = tiny_model(name)
    context = described(model, kind, grids)
    table = torch.tensor(grids)
    place = get_vision_position_ids(table, MERGE).float()
    frame = torch.cat([torch.arange(t).repeat_interleave(h * w) for t, h, w in grids]).float()
    values = torch.cat([frame[:, None], place], dim=1)
    if name == "qwen2.5-vl":  # the encoder itself permutes whatever belongs to a patch
        visual = model.model.visual
        index, _ = get_vision_window_index(table, MERGE, visual.window_size, visual.patch_size)
        values = visual.permute_input_for_window_attn(values, index, len(values))
    for item, tokens, (t, h, w) in zip(context.items, context.to_tokens(values), grids, strict=True):
        assert torch.equal(torch.stack([item.crop.float(), item.row, item.col], 1), tokens)
        assert (item.kind, item.n_crops, item.crop_grid) == (kind, t, (h, w))
        assert item.grid == (t, h // MERGE, w // MERGE)
        assert (item.newlines, int(item.newline.sum()), item.thumbnail, item.tiling) == (0, 0, None, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_key_depends_on_the_items_pixels_alone(name: str, kind: str) -> None:
    model = tiny_model(name)
    grids = [(1, 4, 6), (1, 4, 6), (1, 6, 10), (1, 4, 6)]
    parts = pixels(grids, seed=3)
    keys = described(model, kind, grids, parts).fingerprint
    assert keys.shape == (4,)
    assert len(set(keys.tolist())) == 4
    for order in ([3, 2, 1, 0], [1, 2], [2], [0, 1], [0, 2, 0, 3]):
        again = described(model, kind, [grids[i] for i in order], [parts[i] for i in order]).fingerprint
        assert torch.equal(again, keys[order])
    changed = parts[1].clone()
    changed[0, 0] += 1
    assert int(described(model, kind, [grids[1]], [changed]).fingerprint) != int(keys[1])


def test_facts_of_the_tiny_models_and_of_published_checkpoints() -> None:
    families = adapters.families()
    layers = {"qwen2-vl": (0, 1, 2, 3), "qwen2.5-vl": (1, 3), "qwen3-vl": (0, 1, 2, 3)}
    for name in NAMES:
        adapter = adapters.of(tiny_model(name))
        spec = adapter.spec
        assert (adapter.family, adapter.modalities, adapter.packed) == (name, ("image", "video"), True)
        assert (spec.vision_layers, spec.feature_layer, spec.llm_layers) == (4, 3, 4)
        assert (spec.has_cls, spec.mrope, spec.full_attention_layers) == (False, True, layers[name])
        assert adapter.deepstack == (name == "qwen3-vl")
        assert adapter.placeholders == {"image": 120, "video": 121}
        (reference,) = families[name].references
        assert (reference.family, reference.has_cls, reference.mrope) == (name, False, True)
        assert reference.feature_layer == reference.vision_layers - 1
        assert len(families[name].towers) == len(families[name].references)
    assert families["qwen2.5-vl"].references[0].full_attention_layers == (7, 15, 23, 31)


# --- refusals
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_class_token_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedMethod, match=r"none; use Rows\.RECEIVED"):
        VisionRecorder(adapters.of(tiny_model(name)), Needs({1: Rows.CLS}))


@pytest.mark.parametrize("name", NAMES)
def test_taps_under_eager_attention_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"):
        vtc.compress(tiny_model(name, attn_implementation="eager"), "vtc_cls", retention=0.5)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_sliding_windows_are_refused(name: str) -> None:
    model = tiny_model(name)
    config = type(model.config)(
        **{
            **model.config.to_dict(),
            "text_config": {
                **{k: v for k, v in model.config.text_config.to_dict().items() if k != "layer_types"},
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
        }
    )
    assert set(config.text_config.layer_types) == {"full_attention", "sliding_attention"}
    with pytest.raises(UnsupportedModel, match="sliding-window or linear attention"):
        adapters.of(type(model)(config))


def test_deepstack_rows_behind_the_last_layer_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"behind each of its 3 LLM layers \(3 sets\)"):
        adapters.of(tiny_model("qwen3-vl", layers=3))
    assert adapters.of(tiny_model("qwen3-vl", layers=4)).deepstack
