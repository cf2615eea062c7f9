"""DivPrune: the order of choice and the shortened prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.method.budget import tokens_to_keep
from vtc.ops.greedy import chosen, k_center, most_isolated


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    assert case["case"] == "case1"
    settings = case["hyper_parameters"]
    start, count, keep = settings["visual_start"], settings["num_visual"], settings["keep"]
    assert tokens_to_keep(count, settings["subset_ratio"]) == keep
    rows = tensors["in.inputs_embeds"]
    tokens = rows[:, start : start + count]
    mask = torch.ones(1, count, dtype=torch.bool)
    order = k_center(tokens, most_isolated(tokens, mask), keep, mask)
    marks = chosen(order, torch.tensor([keep]), mask)
    alive = torch.ones(rows.shape[:2], dtype=torch.bool)
    alive[:, start : start + count] = marks
    return {
        "out.selected_in_order": (order[0], 0.0, 0.0),
        "out.kept": (marks[0].nonzero().flatten(), 0.0, 0.0),
        "out.inputs_embeds": (rows[alive][None], 0.0, 0.0),
    }
