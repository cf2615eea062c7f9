"""PyramidDrop: three stages and a decode step on a tiny LLM, ranked by the stage layers' own projections."""

from __future__ import annotations

from typing import Any

import _llm as llm
import _replay as replay
from _replay import Outputs
from torch import Tensor

import vtc

OPTIONS = {"layer_list": "layers", "image_token_ratio_list": "ratios"}


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, given = replay.settings(case), replay.options(case, OPTIONS)
    start, image = settings["image_start"], settings["num_image"]
    model = llm.build(case["llama_config"], llm.weights(tensors, "w."), image=image)
    prompt = tensors["in.inputs_embeds"], tensors["in.decode_embeds"]
    run = llm.run(model, *prompt, start=start, image=image, method=vtc.create("pyramiddrop", **given))
    assert run.lengths == case["kv_cache_lengths_after_prefill"]
    step = dict(zip((0, *given["layers"]), run.positions[1], strict=True))
    decoded = [int(step[max(start for start in step if start <= layer)]) for layer in range(len(run.inputs))]
    assert decoded == case["decode_position_per_layer"]
    outputs: Outputs = {
        "out.last_hidden_state": (run.states[0][None], 0.0, 2e-4),
        "out.decode_last_hidden_state": (run.states[1][None], 0.0, 2e-4),
    }
    for stage, layer in enumerate(given["layers"]):
        outputs[f"out.stage{stage}.kept_image"] = (run.kept[layer], 0.0, 0.0)
        outputs[f"out.stage{stage}.hidden"] = (run.inputs[layer][None], 0.0, 2e-4)
    return outputs


CHECKS = {"in.inputs_embeds": replay.Check(check, given=("in.", "w."))}
