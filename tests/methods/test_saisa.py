"""SAISA: text rows through blocks called by hand, visual rows from each layer's projector; weights and refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from vtc import adapters
from vtc.errors import BudgetError, UnsupportedMethod, VTCError
from vtc.eval.training.settings import TrainingSettings
from vtc.method.base import ModelSpec
from vtc.methods.saisa import SAISA
from vtc.testing import TINY_MODELS, check_method, tiny_inputs, tiny_model
from vtc.testing.contract import LIMIT, with_fresh_weights

VISUAL, FIRST = 16, 4  # of the prompt below: tokens, and place of the first one
INPUTS: list[list[Any]] = [[4, "image", 5]]


def stored(name: str, folder: Path, **options: Any) -> SAISA:
    """With random projectors, the last maps of residual ones among them."""
    method, spec = SAISA(training=True, **options), adapters.of(tiny_model(name)).spec
    torch.manual_seed(2)
    module = method.module(spec)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.2)
    path = method.save(folder / f"{name}.safetensors", module, spec)
    return dataclasses.replace(method, training=False, weights=str(path))


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Tensor], projectors: Any, residual: bool) -> Tensor:
    """Logits of the text rows of one prompt: no queries and no MLP of visual rows, as the paper runs it."""
    llm, visual = model.model.language_model, slice(FIRST, FIRST + VISUAL)
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    features = tower.hidden_states[model.config.vision_feature_layer][:, 1:].float()
    own = model.model.multi_modal_projector(features) if residual else 0
    hidden = llm.embed_tokens(inputs["input_ids"])
    length = hidden.shape[1]
    text = torch.tensor([place for place in range(length) if not FIRST <= place < FIRST + VISUAL])
    mask = torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    places = llm.rotary_emb(hidden, torch.arange(length)[None])
    for number, layer in enumerate(llm.layers):
        first, _, last = projectors[f"layer{number}"]
        hidden[:, visual] = torch.nn.functional.gelu(features @ first.weight.T + first.bias) @ last.weight.T + last.bias
        hidden[:, visual] += own
        normed = layer.input_layernorm(hidden)
        attended, _ = layer.self_attn(normed, position_embeddings=places, attention_mask=mask[None, None])
        rows = hidden[:, text] + attended[:, text]
        hidden[:, text] = rows + layer.mlp(layer.post_attention_layernorm(rows))
        hidden[:, visual] = math.nan  # nobody reads what a layer made of these
    return model.lm_head(llm.norm(hidden[:, text]))


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_text_rows_are_those_of_blocks_called_by_hand(tmp_path: Path, residual: bool) -> None:
    inputs, model = tiny_inputs("llava-clip", INPUTS, seed=3), tiny_model("llava-clip")
    with vtc.compress(model, stored("llava-clip", tmp_path, residual=residual)) as handle:
        output, projectors = model(**inputs, use_cache=True), handle.module
    eager = tiny_model("llava-clip", attn_implementation="eager")
    expected = by_hand(eager, inputs, projectors, residual)
    found = torch.cat([output.logits[:, :FIRST], output.logits[:, FIRST + VISUAL :]], dim=1)
    assert float((found - expected).abs().max()) < LIMIT
    assert float((found - model(**inputs).logits[:, [*range(FIRST), *range(-5, 0)]]).abs().max()) > 100 * LIMIT
    assert handle.stats.retention == handle.stats.cache_retention == 1.0
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == [25] * 4


@torch.no_grad()
def test_fresh_residual_projectors_show_every_layer_the_models_own_rows() -> None:
    model = tiny_model("llava-clip")
    inputs = tiny_inputs("llava-clip", INPUTS, seed=3)
    spec = adapters.of(model).spec
    seen: list[Tensor] = []
    with vtc.compress(model, with_fresh_weights(SAISA(residual=True), spec)):
        hooks = [
            layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
            for layer in model.model.language_model.layers
        ]
        model(**inputs)
    for hook in hooks:
        hook.remove()
    own = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert len(seen) == 4
    assert all(torch.equal(rows[0, FIRST : FIRST + VISUAL], own) for rows in seen)


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl"])
def test_the_contract_with_projectors_that_are_no_zeros(tmp_path: Path, name: str) -> None:
    """Beside newlines, and over rows that the model adds inside its first layers."""
    method = stored(name, tmp_path, residual=True)
    check_method(method, models=[name], steps=2, policies=["preserve"], generation=("greedy", "no cache"))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_tells_how_wide_its_encoder_is(name: str) -> None:
    adapter = adapters.of(tiny_model(name))
    assert adapter.spec.vision_width == adapter.shape(adapter.model.config).tower.hidden > 0


def test_every_projector_learns_but_for_pictures_nobody_asks_about() -> None:
    model, method = tiny_model("llava-clip").requires_grad_(False), SAISA(training=True)
    inputs = tiny_inputs("llava-clip", INPUTS, seed=3)
    with vtc.compress(model, method, pad_output=True) as handle:
        logits = model(**inputs, use_cache=False).logits
        logits[:, : FIRST - 1].square().sum().backward(retain_graph=True)  # text in front of the picture
        assert handle.module is not None
        assert not any(weight.grad.any() for weight in handle.module.parameters() if weight.grad is not None)
        logits[:, -1].square().sum().backward()
        assert all(bool(weight.grad.any()) for name, weight in handle.module.named_parameters() if "bias" not in name)


def test_plans_and_refusals(tmp_path: Path) -> None:
    model = tiny_model("llava-clip")
    with pytest.raises(VTCError, match=r"'saisa' runs on learned weights and none were given; .* --method saisa"):
        vtc.compress(model, "saisa")
    method = stored("llava-clip", tmp_path)
    assert vtc.learned.load(method.weights) == method  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="'saisa' takes no retention or keep"):
        vtc.compress(model, method, retention=0.5)
    with pytest.raises(VTCError, match="were made with residual='false', this run has residual='true'"):
        vtc.compress(model, dataclasses.replace(method, residual=True))
    with pytest.raises(UnsupportedMethod, match="does not tell how wide they are; give its ModelSpec a vision_width"):
        method.build(ModelSpec("mine", 24, 22, True, tuple(range(24)), 32, width=64))
    with pytest.raises(UnsupportedMethod, match="'random' and 'saisa' both act at 0"):
        vtc.compress(model, ["random", method], retention=[0.5, None])
    assert isinstance(TrainingSettings("saisa", {"residual": True}).compressor(), SAISA)
