"""Golden cases that were made on a bare tiny LLM, run through `vtc.compress` on a whole multimodal model.

The cases store a Llama or Qwen2 configuration, its weights, and the embedding rows of a prompt in which an image is one
run of rows. Here that LLM becomes the language model of an InternVL whose image consists of as many tiles as give the
run's length (150 tokens are 6 tiles of 5 x 5), and the stored rows take the place of the embeddings that the model
computes itself. Everything else is what a user's call does::

    model = llm.build(case["llama_config"], llm.weights(tensors, "w."), image=36)
    run = llm.run(model, tensors["in.inputs_embeds"], tensors["in.decode_embeds"], start=5, image=36,
                  method=vtc.create("fastv"), keep=27)
    run.states[0]       # [L', D] last hidden state of the prefill, run.states[1:] one row per decode step
    run.kept[2]         # image tokens that passed stage 2

Cases that store attention instead of weights run on `bare` models, whose layers hand on what enters them: a prompt of
`numbered` rows then tells at every layer which of them are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import _replay as replay
import _towers as towers
import torch
import transformers
from torch import Tensor

from vtc.method.base import Compressor


def weights(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it and without the name of the decoder stack."""
    chosen = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix("model."): value.float() for name, value in chosen.items()}


def build(config: dict[str, Any], weights: dict[str, Tensor] | None, *, image: int) -> Any:
    """An InternVL around the stored LLM, for images of `image` tokens, in float32.

    config: as stored; biased projections make it a Qwen2, otherwise it is a Llama. weights: names of the decoder stack
    (`layers.0.self_attn.q_proj.weight`); every one must find its place and only the token embeddings may be missing.
    None leaves random ones.
    """
    given = {k: v for k, v in (weights or {}).items() if k not in ("embed_tokens.weight", "lm_head.weight")}
    kind = transformers.Qwen2Config if any(name.endswith("q_proj.bias") for name in given) else transformers.LlamaConfig
    settings = dict(config) | {"vocab_size": 8, "pad_token_id": None}
    theta = settings.pop("rope_theta")
    side, _ = tile(image)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    whole = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**tower, image_size=[2 * side, 2 * side], patch_size=[1, 1]),
        text_config=kind(**settings, rope_theta=theta),
        image_token_id=towers.IMAGE,
        image_seq_length=side * side,
        tie_word_embeddings=False,
    )
    model = towers.made(transformers.InternVLForConditionalGeneration, whole)
    stack = model.model.language_model
    if weights is not None:
        missing, unknown = stack.load_state_dict(given, strict=False)
        assert not unknown and missing == ["embed_tokens.weight"], (missing, unknown)
    frequencies = theta ** -(torch.arange(0, len(stack.rotary_emb.inv_freq)).float() / len(stack.rotary_emb.inv_freq))
    assert torch.allclose(stack.rotary_emb.inv_freq, frequencies), "another rotary base than the stored one"
    return model


def bare(*, image: int, layers: int, width: int = 16, heads: int = 2) -> Any:
    """As `build`, with layers that change nothing."""
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_attention_heads": heads, "num_key_value_heads": heads}
    model = build({**sizes, "num_hidden_layers": layers, "rope_theta": 1e4}, None, image=image)
    towers.pass_through(model.model.language_model.layers)
    return model


def numbered(length: int, width: int = 16) -> Tensor:
    """[1, length, width] rows that begin with their number."""
    rows = towers.pixels(1, length, width)
    return rows.index_copy(2, torch.tensor([0]), torch.arange(length).float()[None, :, None])


def numbers(rows: Tensor) -> Tensor:
    """The numbers of what is left of `numbered` rows."""
    return rows[..., 0].round().long()


def tile(image: int) -> tuple[int, int]:
    """Side of the largest square tiles that `image` tokens can be cut into, and their number."""
    side = max(side for side in range(1, image + 1) if image % (side * side) == 0)
    return side, image // (side * side)


def run(
    model: Any,
    embeds: Tensor,
    decode: Tensor | None = None,
    *,
    start: int,
    image: int,
    method: Compressor | None = None,
    attention: Mapping[int, Any] | None = None,
    **more: Any,
) -> replay.Run:
    """Prefill with the rows `embeds` [1, L, D] or [L, D], then one step per row of `decode` ([S, D] or [1, S, D]).

    start: first of the `image` rows that are the image. attention: by LLM layer; it and more: as `_replay.run`. Tensors
    of the result lack the batch.
    """
    embeds, steps = embeds.flatten(0, -2).float(), [] if decode is None else list(decode.flatten(0, -2).float())
    side, tiles = tile(image)
    inputs = towers.prompt(image, before=start, after=len(embeds) - start - image)
    inputs["pixel_values"] = towers.pixels(tiles, 3, 2 * side, 2 * side)
    layers = model.model.language_model.layers
    recorded = {layers[number].self_attn: each for number, each in (attention or {}).items()}
    given = [embeds[None], *(step[None, None] for step in steps)]
    found = replay.run(model, inputs, method, rows=given, attention=recorded, **more)
    found.states, found.inputs, found.keys = (
        [each[0] for each in some] for some in (found.states, found.inputs, found.keys)
    )
    return found
