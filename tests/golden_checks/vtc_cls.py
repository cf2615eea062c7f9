"""VTC-CLS: its score and the kept patches per budget, on a LLaVA whose tower has the case's class-token attention."""

from __future__ import annotations

from typing import Any

import _replay as replay
import _towers as towers
from _replay import Outputs
from torch import Tensor

import vtc
from vtc import adapters

OPTIONS = {"start_layer": "start_layer"}


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, method = replay.settings(case), vtc.create("vtc_cls", **replay.options(case, OPTIONS))
    model = towers.build("llava", 24, width=2 * settings["num_heads"], heads=settings["num_heads"])
    layers = adapters.of(model).vision_attention
    recorded = zip(tensors["in.layer_ids"].tolist(), tensors["in.cls_attn"][:, None], strict=True)
    attention = {layers[layer]: replay.class_row(row) for layer, row in recorded}
    inputs = towers.prompt(576) | {"pixel_values": towers.pixels(1, 3, 24, 24)}
    first, *others = settings["budgets"]
    run = replay.run(model, inputs, method, attention=attention, retention=first / 576)
    outputs: Outputs = {
        f"out.kept_{first}": (run.kept[0], 0.0, 0.0),
        "out.score": (method.score(run.view(0))[0], 1e-5, 0.0),  # type: ignore[attr-defined]
    }
    for budget in others:
        keep = replay.again(method, run.view(0), retention=budget / 576).keep[0]
        outputs[f"out.kept_{budget}"] = (keep.nonzero().flatten(), 0.0, 0.0)
    return outputs


CHECKS = {"in.cls_attn": replay.Check(check, given=("in.",))}
