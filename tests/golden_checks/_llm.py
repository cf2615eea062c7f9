"""Golden cases that were made on a bare tiny LLM, run through `vtc.compress` on a whole multimodal model.

The cases store a Llama or Qwen2 configuration, its weights, and the embedding rows of a prompt in which an image is one
run of rows. Here that LLM becomes the language model of an InternVL whose image consists of as many tiles as give the
run's length (150 tokens are 6 tiles of 5 x 5), and the stored rows take the place of the embeddings that the model
computes itself. Everything else is what a user's call does.

Test modules cannot import one another (`--import-mode=importlib`), so a checker loads this file by its path::

    spec = importlib.util.spec_from_file_location("golden_llm", Path(__file__).with_name("_llm.py"))
    llm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llm)

    model = llm.build(case["llama_config"], llm.weights(tensors, "w."), image=36)
    run = llm.run(model, tensors["in.inputs_embeds"], tensors["in.decode_embeds"], start=5, image=36,
                  method=vtc.create("fastv"), keep=27)
    run.states[0]       # [L', D] last hidden state of the prefill, run.states[1:] one row per decode step
    run.kept[2]         # image tokens that passed stage 2
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vtc
from vtc.method.base import Compressor, Stage

IMAGE, TEXT, VOCABULARY = 7, 3, 8


class Run(NamedTuple):
    """What one prompt and its decode steps left behind.

    states: last hidden state (after the final norm) of every call, [rows, D]. inputs: rows that entered every LLM layer
    at the prefill, [rows, D]. keys: rotated keys of every layer after the prefill, [heads, rows, D]; lengths: their
    number. kept: stage -> image tokens that passed it, in ascending order. alive: stage -> rows of the prompt that are
    left behind it, text too. Both are empty without a method. handle: the detached handle, None without a method.
    """

    states: list[Tensor]
    inputs: list[Tensor]
    keys: list[Tensor]
    lengths: list[int]
    kept: dict[Stage, Tensor]
    alive: dict[Stage, Tensor]
    handle: vtc.Handle | None


def weights(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it and without the name of the decoder stack."""
    chosen = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix("model."): value.float() for name, value in chosen.items()}


def build(config: dict[str, Any], weights: dict[str, Tensor], *, image: int, **vision: Any) -> Any:
    """An InternVL around the stored LLM, for images of `image` tokens, in float32.

    config: as stored; biased projections make it a Qwen2, otherwise it is a Llama. weights: names of the decoder stack
    (`layers.0.self_attn.q_proj.weight`); every one must find its place and only the token embeddings may be missing.
    vision: changes to the InternVisionConfig of the (random) tower.
    """
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        LlamaConfig,
        Qwen2Config,
    )

    qwen = any(name.endswith("q_proj.bias") for name in weights)
    settings = dict(config) | {"vocab_size": VOCABULARY, "pad_token_id": None}
    theta = settings.pop("rope_theta")
    text = (Qwen2Config if qwen else LlamaConfig)(**settings, rope_theta=theta)
    side, _ = tile(image)
    tower: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [2 * side, 2 * side],
        "patch_size": [1, 1],
    }
    whole = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower | vision),
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=side * side,
        tie_word_embeddings=False,
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        model: Any = InternVLForConditionalGeneration(whole).eval().float()
    finally:
        torch.set_rng_state(state)
    stack = model.model.language_model
    rows = {name: value for name, value in weights.items() if name not in ("embed_tokens.weight", "lm_head.weight")}
    missing, unknown = stack.load_state_dict(rows, strict=False)
    assert not unknown and missing == ["embed_tokens.weight"], (missing, unknown)
    frequencies = theta ** -(torch.arange(0, len(stack.rotary_emb.inv_freq)).float() / len(stack.rotary_emb.inv_freq))
    assert torch.allclose(stack.rotary_emb.inv_freq, frequencies), "another rotary base than the stored one"
    model.set_attn_implementation("sdpa")
    return model


def tile(image: int) -> tuple[int, int]:
    """Side of the largest square tiles that `image` tokens can be cut into, and their number."""
    side = max(side for side in range(1, image + 1) if image % (side * side) == 0)
    return side, image // (side * side)


@torch.no_grad()
def run(
    model: Any,
    embeds: Tensor,
    decode: Tensor | None = None,
    *,
    start: int,
    image: int,
    method: Compressor | None = None,
    **options: Any,
) -> Run:
    """Prefill with the rows `embeds` [1, L, D] or [L, D], then one step per row of `decode` ([S, D] or [1, S, D]).

    start: first of the `image` rows that are the image. method: None runs the model alone. options: of `vtc.compress`.
    """
    embeds, steps = embeds.flatten(0, -2).float(), [] if decode is None else list(decode.flatten(0, -2).float())
    given = [embeds, *(step[None] for step in steps)]
    side, tiles = tile(image)
    ids = torch.full((1, len(embeds)), TEXT)
    ids[:, start : start + image] = IMAGE
    pixels = torch.randn(tiles, 3, 2 * side, 2 * side, generator=torch.Generator().manual_seed(0))
    stack = model.model.language_model
    states: list[Tensor] = []
    inputs: list[Tensor] = []

    def feed(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["inputs_embeds"] = given[len(states)][None].to(kwargs["inputs_embeds"])
        return args, kwargs

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not states:
            inputs.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def leave(module: Any, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[0].clone())

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(_removed(stack.register_forward_pre_hook(feed, with_kwargs=True)))
        handle = None if method is None else hooks.enter_context(vtc.compress(model, method, **options))
        hooks.enter_context(_removed(stack.register_forward_hook(leave)))
        for layer in stack.layers:  # behind the engine's own hooks, so that they see what the layer gets
            hooks.enter_context(_removed(layer.register_forward_pre_hook(enter, with_kwargs=True)))
        cache = model(input_ids=ids, pixel_values=pixels, use_cache=True).past_key_values
        keys = [layer.keys[0].clone() for layer in cache.layers]
        for _ in steps:
            cache = model(input_ids=torch.full((1, 1), TEXT), past_key_values=cache, use_cache=True).past_key_values
    kept: dict[Stage, Tensor] = {}
    alive: dict[Stage, Tensor] = {}
    if handle is not None:
        kept = handle.trace[0].items[0].kept
        alive = {stage: rows[0].nonzero().flatten() for stage, rows in handle.trace[0].keep.items()}
    return Run(states, inputs, keys, [each.shape[1] for each in keys], kept, alive, handle)


@contextlib.contextmanager
def _removed(hook: Any) -> Iterator[None]:
    """Remove a hook at the end."""
    try:
        yield
    finally:
        hook.remove()
