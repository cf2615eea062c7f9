"""Shapes become models that the library reads back as the same shapes; cut ones say so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vtc import adapters
from vtc.app.loading import Loaded
from vtc.cost.exact import weights
from vtc.cost.shapes import ModelShape
from vtc.errors import InputError
from vtc.eval.bench.arms import arms, limit
from vtc.eval.bench.configs import SHAPES, SMALL, config, family
from vtc.eval.bench.models import SHARE, Subject, build, fitting, subject
from vtc.eval.bench.processors import processor
from vtc.eval.bench.scene import Scene
from vtc.eval.bench.spec import Load


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_has_the_sizes_of_its_shape(name: str) -> None:
    found, wanted = adapters.shape_of(config(SHAPES[name])), SHAPES[name]
    assert replace(found.llm, kind="") == replace(wanted.llm, kind="")
    for part in ("tower", "projector", "crop_patches", "window"):
        assert getattr(found, part) == getattr(wanted, part)


def shrunk(shape: ModelShape) -> ModelShape:
    """A shape of the same family that a CPU builds at once."""
    llm = replace(shape.llm, hidden=128, intermediate=64, layers=4, heads=1, kv_heads=1, head_dim=128, vocabulary=512)
    wide = 4 * 64 if shape.name.startswith("qwen2-vl") else 64
    full = (3, 7) if shape.tower.full else None
    tower = replace(shape.tower, hidden=64, intermediate=wide, layers=8 if full else 4, inner=64, full=full)
    return replace(shape, llm=llm, tower=tower)


FAMILIES = {
    "llava-1.5-7b": (576, 1), "llava-next-7b": (1176, 1), "llava-onevision-0.5b": (1485, 1), "qwen2-vl-2b": (64, 0.3),
    "qwen2.5-vl-3b": (64, 0.3), "qwen3-vl-4b": (49, 0.3), "internvl3-1b": (256, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_runs_on_pictures_and_on_natively_short_embeddings(name: str) -> None:
    shape = shrunk(SHAPES[name])
    model = build(shape, 4, device="cpu", dtype=torch.float32)
    loaded = Loaded(name, name, model, processor(family(shape), shape, model.config))
    scene = Scene(Subject(loaded, "", 4, 4, random=True), Load(1, 224, 224), 2, 2, "what is shown ?")
    tokens, least = FAMILIES[name]
    assert scene.visual == tokens
    admitted = [scene.admit(arm) for arm in arms(["random"], [0.5])]
    short = scene.admit(limit(round(admitted[1].visual)))
    assert [each.kv_bytes for each in admitted] == [each.counted_kv_bytes for each in admitted]
    assert short.kv_bytes == admitted[1].kv_bytes and short.visual == round(admitted[1].visual)
    untouched, ours, native = (scene.request(arm) for arm in [*arms(["random"], [0.5]), limit(round(short.visual))])
    assert all(values["vision"] and values["prefill"] for values in (untouched, ours, native))
    if least < 1:  # sizes change the number of tokens there
        fewer = scene.admit(arms(["downsample"], [0.5])[1])
        assert least * tokens < fewer.visual <= (tokens + 1) // 2  # rounded half up


def test_as_many_layers_as_fit() -> None:
    shape = SHAPES["llava-1.5-7b"]
    whole = 2 * weights(shape)
    assert fitting(shape, 2, whole / SHARE * 1.001) == 32
    fewer = fitting(shape, 2, whole / SHARE / 2)
    assert 1 < fewer < 32
    assert 2 * weights(replace(shape, llm=replace(shape.llm, layers=fewer))) <= whole / 2
    with pytest.raises(InputError, match=r"not even one LLM layer .* smaller shape"):
        fitting(shape, 4, 1e8)


def test_a_cut_model_says_so() -> None:
    found = subject(SMALL, layers=2, device="cpu")
    assert (found.layers, found.of, found.title) == (2, 8, "small-llava, 2 of 8 LLM layers")
    assert len(adapters.of(found.loaded.model).layers) == 2
    assert found.loaded.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": SMALL, "layers": 9}, "layers=9 of 'small-llava', which has 8"),
        ({"name": SMALL, "layers": 0}, "write 1 to 8"),
        ({"name": "tiny-llava", "layers": 2}, "checkpoint and measured whole"),
        ({"name": SMALL, "layers": 1, "dtype": "int8"}, "no floating-point dtype"),
        ({"name": SMALL, "layers": 1, "attention": "none_such"}, "cannot be built with attention='none_such'"),
        ({"name": "no-such", "layers": None}, "cannot load model 'no-such'"),
    ],
)
def test_refusals(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        subject(**{"device": "cpu", **given})
