"""VTC-CLS: head means of the window's class rows, their sum, and the kept patches per budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.method.base import ModelSpec
from vtc.methods.vtc_cls import ensemble
from vtc.ops.select import top_k


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    settings = case["hyper_parameters"]
    assert (settings["head_reduction"], settings["end_layer_exclusive"]) == ("mean", settings["num_layers"] - 1)
    layers = settings["num_layers"]
    spec = ModelSpec("llava", layers, layers - 2, True, tuple(range(layers)), 32)
    method = vtc.create("vtc_cls", start_layer=settings["start_layer"])
    attention = tensors["in.cls_attn"].float().mean(1)[:, 1:]
    rows = dict(zip(tensors["in.layer_ids"].tolist(), attention, strict=True))
    score = ensemble([rows[layer][None] for layer in method.window(spec)], method.reduction)  # type: ignore[attr-defined]
    outputs = {"out.score": (score[0], 1e-5, 0.0)}  # summed in another order
    for budget in settings["budgets"]:
        kept = top_k(score, torch.tensor([budget]))[0].nonzero().flatten()
        outputs[f"out.kept_{budget}"] = (kept, 0.0, 0.0)
        retained = top_k(score, torch.tensor([vtc.tokens_to_keep(576, budget / 576)]))[0].nonzero().flatten()
        assert torch.equal(retained, kept)
    return outputs
