"""LLaVA: geometry and packing of every tower and selection setting; and how an adapter is found for a model."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import vtc
from vtc import adapters
from vtc.errors import UnsupportedModel
from vtc.method.base import Rows
from vtc.testing import TINY_MODELS, FixedKeep, tiny_inputs, tiny_model
from vtc.testing.contract import against_oracle, generate

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT = {**SIZE, "hidden_size": 64, "vocab_size": 128, "pad_token_id": 0}
GRID = 4


def llava(tower: str = "clip", **settings: Any) -> Any:
    vision = {
        "clip": CLIPVisionConfig,
        "siglip": SiglipVisionConfig,
        "dinov2": Dinov2Config,
        "other": DINOv3ViTConfig,
    }[tower]
    config = LlavaConfig(
        vision_config=vision(**SIZE, image_size=7 * GRID, patch_size=7),
        text_config=LlamaConfig(**TEXT),
        image_token_index=120,
        **settings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():  # large, so that attention has peaks and a wrong token moves the logits
        if weight.ndim >= 2 and weight.numel():
            weight.data = torch.randn(weight.shape, generator=generator) * (1.6 / weight[0].numel() ** 0.5)
    return model


def prompt(tokens: int) -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6] + [120] * tokens + [7, 8], [9] + [120] * tokens + [10, 11, 12]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


# --- facts and geometry
@pytest.mark.parametrize(
    ("tower", "settings", "feature_layer"),
    [
        ("clip", {}, 2),  # -2: the output of the last layer but one
        ("clip", {"vision_feature_layer": -1}, 3),
        ("clip", {"vision_feature_layer": 2}, 1),
        ("clip", {"vision_feature_layer": [-3, -2]}, 2),  # the deepest of several counts
        ("siglip", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, 3),
        ("dinov2", {}, 2),
    ],
)
def test_facts_about_the_model(tower: str, settings: Any, feature_layer: int) -> None:
    adapter = adapters.of(llava(tower, **settings))
    spec = adapter.spec
    assert dataclasses.asdict(spec) == {
        "family": "llava",
        "vision_layers": 4,
        "feature_layer": feature_layer,
        "clip": tower == "clip",
        "has_cls": tower != "siglip",
        "full_attention_layers": (0, 1, 2, 3),
        "llm_layers": 4,
        "mrope": False,
        "encoder_stages": isinstance(settings.get("vision_feature_layer", -2), int),
        "single_crop": True,
        "width": 64,
        "vision_width": 32,
        "packed": False,
        "joins": False,
    }
    assert len(adapter.vision_layers) == len(adapter.vision_attention) == len(adapter.layers) == 4
    assert adapter.placeholders == {"image": 120}


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, 2, [-2, 1]])
def test_tokens_are_the_rows_the_model_projects(
    encode: Any, limits: Any, tower: str, strategy: str, layer: Any
) -> None:
    """`to_tokens` on the encoder's rows gives what the projector got, in the order of the tokens."""
    model = llava(tower, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    output, context = encode(model, "image", prompt(16)["pixel_values"])
    layers = [layer] if isinstance(layer, int) else layer
    rows = torch.cat([output.hidden_states[index] for index in layers], dim=-1)
    tokens = context.to_tokens(rows)
    assert [len(each) for each in tokens] == [item.n_tokens for item in context.items]
    for each, features in zip(tokens, output.pooler_output, strict=True):
        with torch.no_grad():
            assert float((model.model.multi_modal_projector(each) - features).abs().max()) <= limits.hidden


@pytest.mark.parametrize(
    ("tower", "strategy", "first"),
    [
        ("clip", "default", 0),
        ("clip", "full", -1),
        ("siglip", "full", 0),
        ("siglip", "default", 1),
        ("dinov2", "full", -1),
    ],
)
def test_geometry(encode: Any, tower: str, strategy: str, first: int) -> None:
    """Patches in raster order; the class token lies outside the raster; a cut first patch leaves none."""
    model = llava(tower, vision_feature_select_strategy=strategy)
    _, context = encode(model, "image", prompt(16)["pixel_values"])
    assert context.kind == "image"
    assert len(context.items) == len(context.fingerprint) == 2
    patches = list(range(first, 16))
    for item in context.items:
        assert item.n_tokens == len(patches)
        assert item.row.tolist() == [-1 if p < 0 else p // GRID for p in patches]
        assert item.col.tolist() == [-1 if p < 0 else p % GRID for p in patches]
        assert item.crop.tolist() == [0] * len(patches)
        assert not item.newline.any()
        assert (item.n_crops, item.crop_grid, item.newlines) == (1, (GRID, GRID), 0)
        assert item.grid == ((1, GRID, GRID) if first == 0 else None)
        assert item.regions == (((1, GRID, GRID),) if first == 0 else ())


@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, [-2, 1]])
@pytest.mark.parametrize("method", ["vtc_cls", "stride", FixedKeep(at=(0, 2))])
def test_every_setting_is_exact(tower: str, strategy: str, layer: Any, method: Any, limits: Any) -> None:
    model = llava(tower, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    inputs = prompt(16 + (tower != "siglip") - (strategy == "default"))
    budget = {} if isinstance(method, FixedKeep) else {"retention": 0.5}
    assert against_oracle(model, inputs, lambda m: vtc.compress(m, method, **budget), 3) <= limits.logits


def test_the_class_row_skips_the_class_token(look: Any) -> None:
    """With the class token among the LLM's tokens, its attention to itself is the score of that token."""
    for strategy, count in (("default", 16), ("full", 17)):
        model = llava("clip", vision_feature_select_strategy=strategy)
        view = look(model, prompt(count), {2: Rows.CLS})
        rows = view.vision_attention(2)
        assert rows.shape == (2, count)
        total = rows.sum(1)
        assert bool(((total - 1).abs() < 1e-5).all()) == (strategy == "full")


def test_pixels_have_a_key(encode: Any) -> None:
    model, pixels = llava(), prompt(16)["pixel_values"]
    _, context = encode(model, "image", pixels)
    _, swapped = encode(model, "image", pixels.flip(0))
    assert swapped.fingerprint.tolist() == context.fingerprint.tolist()[::-1]
    assert len(set(context.fingerprint.tolist())) == 2


def test_other_towers_are_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"LLaVA with a 'dinov3_vit' tower.*clip_vision_model, dinov2, siglip_vision_model"
    ):
        vtc.compress(llava("other"), "random", keep=4)


# --- finding the adapter
def test_the_table_of_families_is_consistent() -> None:
    for name, target in adapters.FAMILIES.items():
        adapter = adapters.load(target)
        assert name in adapter.model_classes
        assert target.startswith("vtc.adapters.")
    families = adapters.families()
    assert list(families) == sorted(families)
    assert {name for cls in families.values() for name in cls.model_classes} == set(adapters.supported_classes())
    for family, cls in families.items():
        assert cls.family == family
        assert cls.references
        assert {spec.family for spec in cls.references} == {family}
        assert len(cls.towers) == len(cls.references)
        for spec in cls.references:
            assert 0 < spec.feature_layer < spec.vision_layers
            assert set(spec.full_attention_layers) <= set(range(spec.vision_layers))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models_find_their_adapter(name: str) -> None:
    model = tiny_model(name)
    adapter = adapters.of(model)
    assert adapter.model is model
    assert type(model).__name__ in adapter.model_classes
    assert adapter.spec.family == adapter.family == TINY_MODELS[name].family
    assert set(TINY_MODELS[name].kinds) <= set(adapter.modalities)


def test_every_family_has_a_tiny_model() -> None:
    assert {tiny.family for tiny in TINY_MODELS.values()} == set(adapters.families())


def test_subclasses_and_wrappers_count_as_the_model(clip: Any) -> None:
    class Fine(LlavaForConditionalGeneration):
        pass

    class Wrapper(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def get_base_model(self) -> Any:
            return self.inner

    clip.__class__ = Fine
    assert adapters.of(clip).model is clip
    wrapper = Wrapper(clip)
    assert adapters.of(wrapper).model is clip
    inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
    with vtc.compress(wrapper, "random", retention=0.5) as handle:
        clip.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert handle.stats.retention == 0.5


def test_a_model_without_adapter_names_those_that_have_one() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        adapters.of(nn.Linear(2, 2))
    assert str(caught.value).startswith("Linear is not supported; supported model classes: ")
    assert all(name in str(caught.value) for name in adapters.supported_classes())


def test_a_package_adds_a_family(clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vtc_family_of_tests.py").write_text(
        "from vtc.adapters.llava import LlavaAdapter\n\n\n"
        "class Own(LlavaAdapter):\n"
        "    family = 'own'\n"
        "    model_classes = ('OwnModel',)\n"
    )
    info = tmp_path / "vtc_family_of_tests-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vtc-family-of-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vtc.adapters]\nOwnModel = vtc_family_of_tests:Own\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        clip.__class__ = type("OwnModel", (LlavaForConditionalGeneration,), {})
        assert adapters.of(clip).family == "own"
        assert "OwnModel" in adapters.supported_classes()
        assert "own" in adapters.families()
        inputs = tiny_inputs("llava-clip", [[3, "image", 5]])
        ids, _ = generate(clip, inputs, vtc.compress(clip, "random", retention=0.5), 2)
        assert ids.shape == (1, 26)
    finally:
        sys.modules.pop("vtc_family_of_tests", None)
        importlib.invalidate_caches()
