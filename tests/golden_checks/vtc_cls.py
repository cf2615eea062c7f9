"""VTC-CLS: its score and the kept patches per budget, on a LLaVA whose tower has the case's class-token attention."""

from __future__ import annotations

from typing import Any

import _replay as replay
import _towers as towers
from _replay import Outputs
from torch import Tensor

import vtc

OPTIONS = {"start_layer": "start_layer"}


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, method = replay.settings(case), vtc.create("vtc_cls", **replay.options(case, OPTIONS))
    rows = [replay.class_row(row) for row in replay.logits(tensors["in.cls_attn"])[:, None]]
    attention = dict(zip(tensors["in.layer_ids"].tolist(), rows, strict=True))
    tower = towers.build("llava", 24, 2 * settings["num_heads"], heads=settings["num_heads"])
    first, *others = settings["budgets"]
    run = tower.run(method, attention=attention, retention=first / 576)
    view, _ = run.at(0)
    kept = {first: run.kept[0]}
    kept |= {each: replay.again(method, view, retention=each / 576)[0].nonzero().flatten() for each in others}
    outputs: Outputs = {f"out.kept_{budget}": (places, 0.0, 0.0) for budget, places in kept.items()}
    return outputs | {"out.score": (method.score(view)[0], 1e-5, 0.0)}  # type: ignore[attr-defined]


CHECKS = {"in.cls_attn": replay.Check(check, given=("in.",))}
