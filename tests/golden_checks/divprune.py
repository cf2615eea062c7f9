"""DivPrune: the order of choice and the shortened prompt, on an LLM that is fed the case's rows."""

from __future__ import annotations

from typing import Any

import _llm as llm
import _replay as replay
from _replay import Outputs
from torch import Tensor

import vtc
from vtc.methods import divprune


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, embeds, method = replay.settings(case), tensors["in.inputs_embeds"], vtc.create("divprune")
    start, image = settings["visual_start"], settings["num_visual"]
    model = llm.bare(width=embeds.shape[2], layers=1, image=image)
    with replay.watched(divprune, "k_center") as orders:
        run = llm.run(model, embeds, start=start, image=image, method=method, retention=settings["subset_ratio"])
    return {
        "out.selected_in_order": (orders[0][0], 0.0, 0.0),
        "out.kept": (run.kept[0], 0.0, 0.0),
        "out.inputs_embeds": (run.inputs[0][None], 0.0, 0.0),
    }


CHECKS = {"in.inputs_embeds": replay.Check(check, given=("in.",))}
