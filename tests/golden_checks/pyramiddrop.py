"""PyramidDrop: three stages and a decode step on a tiny LLM, ranked as released.

The release ranks before layer l by the projections of layer l itself. The method takes the attention of layer l - 1
instead; here the stored weights stand in for what it departs from, everything else is the method's and the engine's.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtc.compressor import StageView
from vtc.methods.pyramiddrop import PyramidDrop
from vtc.ops.attention import attention_rows

spec = importlib.util.spec_from_file_location("golden_llm", Path(__file__).with_name("_llm.py"))
assert spec is not None and spec.loader is not None
llm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llm)


class OwnProjections(PyramidDrop):
    """Ranks before layer l by the norm, the projections and the rotary embedding of layer l on its input."""

    weights: ClassVar[dict[str, Tensor]]
    config: ClassVar[dict[str, Any]]

    def score(self, view: StageView, layer: int) -> Tensor:
        at = lambda name: self.weights[f"layers.{layer}.{name}.weight"]  # noqa: E731
        normed = view.hidden * (view.hidden.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        normed = normed * at("input_layernorm")
        query, key = (self.rotated(normed @ at(f"self_attn.{name}_proj").T) for name in ("q", "k"))
        last = torch.full((len(normed), 1), normed.shape[1] - 1)
        row = attention_rows(query, key, last, query.shape[-1] ** -0.5, causal=True)[:, 0]
        return row[view.items.row[:, None], view.items.index]

    def rotated(self, rows: Tensor) -> Tensor:
        """[B, L, H * D] -> [B, H, L, D] turned by positions 0 .. L - 1, as they are numbered anew at every stage."""
        heads, length = self.config["num_attention_heads"], rows.shape[1]
        split = rows.unflatten(-1, (heads, -1)).transpose(1, 2)
        half = split.shape[-1] // 2
        frequency = self.config["rope_theta"] ** -(torch.arange(half) / half)
        angle = torch.arange(length)[:, None] * frequency
        first, second = split[..., :half], split[..., half:]
        turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
        return torch.cat(turned, dim=-1)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    if case["case"] != "case1":
        raise ValueError(f"unknown case {case['case']}")
    settings, config = case["hyper_parameters"], case["llama_config"]
    start, image, layers = settings["image_start"], settings["num_image"], settings["layer_list"]
    OwnProjections.weights, OwnProjections.config = llm.weights(tensors, "w."), config
    method = OwnProjections(layers=tuple(layers), ratios=tuple(settings["image_token_ratio_list"]))
    model = llm.build(config, OwnProjections.weights, image=image)
    prompt = tensors["in.inputs_embeds"], tensors["in.decode_embeds"]
    run = llm.run(model, *prompt, start=start, image=image, method=method)
    assert run.lengths == case["kv_cache_lengths_after_prefill"] == case["decode_position_per_layer"]
    outputs = {
        "out.last_hidden_state": (run.states[0][None], 0.0, 2e-4),
        "out.decode_last_hidden_state": (run.states[1][None], 0.0, 2e-4),
    }
    for stage, layer in enumerate(layers):
        outputs[f"out.stage{stage}.kept_image"] = (run.kept[layer], 0.0, 0.0)
        outputs[f"out.stage{stage}.hidden"] = (run.inputs[layer][None], 0.0, 2e-4)
    return outputs
