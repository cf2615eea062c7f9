"""FastV: attention of the layer in front, kept tokens, what the later layers get, and a decode step, on a tiny LLM."""

from __future__ import annotations

from typing import Any

import _llm as llm
import _replay as replay
import torch
from _replay import Outputs
from torch import Tensor

import vtc
from vtc.method.base import Rows

OPTIONS = {"K": "layer", "R": "ratio"}


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, given = replay.settings(case), replay.options(case, OPTIONS)
    layer, image, keep = given["layer"], settings["num_image"], settings["keep"]
    prompt: dict[str, Any] = {"embeds": tensors["in.inputs_embeds"], "decode": tensors["in.decode_embeds"]}
    prompt |= {"start": settings["image_start"], "image": image}
    model = llm.build(case["llama_config"], llm.weights(tensors, "w."), image=image)
    published = llm.run(model, method=vtc.create("fastv", **given), **prompt)
    layers = len(published.inputs)
    mean = (layer * image + (layers - layer) * keep) // layers
    run = llm.run(model, method=vtc.create("fastv", layer=layer), keep=mean, **prompt)
    assert run.lengths == case["kv_cache_lengths_after_prefill"]
    return {
        "mid.attn": (matrix(*published.attention[layer - 1]), 1e-4, 1e-7),
        "mid.score": (published.at(layer)[0].llm_attention(layer - 1, Rows.LAST)[0], 1e-4, 0.0),
        "out.keep_index": (run.alive[layer], 0.0, 0.0),
        "out.kept_image": (published.kept[layer], 0.0, 0.0),
        "out.hidden_after_prune": (run.inputs[layer][None], 0.0, 2e-4),
        "out.last_hidden_state": (run.states[0][None], 0.0, 2e-4),
        "out.decode_last_hidden_state": (run.states[1][None], 0.0, 2e-4),
    }


def matrix(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[H, L, L] causal attention of every head."""
    key = key[0].repeat_interleave(query.shape[1] // key.shape[1], dim=0)
    logits = query[0] @ key.transpose(1, 2) * scaling
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)


CHECKS = {"in.inputs_embeds": replay.Check(check, given=("in.", "w."))}
