"""PyramidDrop: three stages and a decode step on a tiny LLM, ranked by the stage layers' own projections."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

import vtc

spec = importlib.util.spec_from_file_location("golden_llm", Path(__file__).with_name("_llm.py"))
assert spec is not None and spec.loader is not None
llm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(llm)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    if case["case"] != "case1":
        raise ValueError(f"unknown case {case['case']}")
    settings, config = case["hyper_parameters"], case["llama_config"]
    start, image, layers = settings["image_start"], settings["num_image"], settings["layer_list"]
    method = vtc.create("pyramiddrop", layers=tuple(layers), ratios=tuple(settings["image_token_ratio_list"]))
    model = llm.build(config, llm.weights(tensors, "w."), image=image)
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
