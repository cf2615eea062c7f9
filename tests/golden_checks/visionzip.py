"""VisionZip: dominant tokens with the class token among them, contextual targets, and the tokens of both kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.method.readings import AttentionCall
from vtc.methods.visionzip.contextual import add_mean, dominant_and_targets, nearest_target
from vtc.methods.visionzip.method import MEAN_KEYS


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    assert case["case"] == "case1"
    settings = case["hyper_parameters"]
    assert settings["total_tokens"] == settings["dominant"] + settings["contextual"]
    hidden, keys = tensors["in.hidden"], tensors["in.keys"]
    score = tensors["in.cls_attn"].sum(1)
    score[:, 0] = torch.inf  # the class token is always among the dominant ones
    metric = MEAN_KEYS.read(AttentionCall(keys, keys, None, 1.0, causal=False))
    mask = torch.ones(score.shape, dtype=torch.bool)
    counts = (torch.full((len(score),), settings[name]) for name in ("dominant", "contextual"))
    best, target = dominant_and_targets(score, *counts, mask)
    into = nearest_target(metric, target, ~best, settings["contextual"])
    merged = add_mean(hidden, into, target)
    rows = [torch.cat([tokens[first], tokens[last]]) for tokens, first, last in zip(merged, best, target, strict=True)]
    return {
        "out.dominant_index": (best.nonzero()[:, 1].view(len(score), -1), 0.0, 0.0),
        "out.contextual_target_index": (target.nonzero()[:, 1].view(len(score), -1), 0.0, 0.0),
        "out.tokens": (torch.stack(rows), 1e-5, 1e-5),
    }
