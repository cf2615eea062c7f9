"""VTC-CLS: its score and the kept patches per budget, on a LLaVA whose tower has the case's class-token attention."""

from __future__ import annotations

from typing import Any

import _replay as replay
import _towers as towers
import vtc
from _replay import Outputs
from torch import Tensor
from vtc import adapters

OPTIONS = {"start_layer": "start_layer"}


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, rows = replay.settings(case), tensors["in.cls_attn"][:, None]
    model = towers.build("llava", 24, width=2 * settings["num_heads"], heads=settings["num_heads"])
    towers_layers = adapters.of(model).vision_attention
    layers = tensors["in.layer_ids"].tolist()
    attention = {towers_layers[layer]: replay.class_row(row) for layer, row in zip(layers, rows, strict=True)}
    inputs = towers.prompt(576) | {"pixel_values": towers.pixels(1, 3, 24, 24)}
    method = vtc.create("vtc_cls", **replay.options(case, OPTIONS))
    outputs: Outputs = {}
    for budget in settings["budgets"]:
        run = replay.run(model, inputs, method, attention=attention, retention=budget / 576)
        outputs[f"out.kept_{budget}"] = (run.kept[0], 0.0, 0.0)
    return outputs | {"out.score": (method.score(run.view(0))[0], 1e-5, 0.0)}  # type: ignore[attr-defined]


CHECKS = {"in.cls_attn": replay.Check(check, given=("in.",))}
