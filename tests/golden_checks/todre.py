"""ToDRE: pivots and orders of both variants on an image and a video, and the decisions of the second stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.method.readings import AttentionCall, QueryRows, Rows
from vtc.methods.todre import parted, shares
from vtc.ops.greedy import best, chosen, cosine_to_mean, k_center, max_sum

INPUTS = ("tokens", "cls_attention", "attention", "token_type")

Outputs = dict[str, tuple[Tensor, float, float]]


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    return {"case1": diverse, "case2": diverse, "case3": relevant}[case["case"]](case["params"], tensors)


def diverse(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    assert (settings["pivot"], settings["similarity"]) == ("cls_attention", "cosine")
    tokens = tensors["tokens"].flatten(0, -2)[None]
    attention = tensors["cls_attention"]
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    pivot = best(attention.flatten()[None], mask)
    cosine = cosine_to_mean(tokens, mask)
    outputs = {"pivot": pivot[0], "pivot_center": best(cosine, mask)[0], "pivot_farthest": best(-cosine, mask)[0]}
    for name, walk in (("max_sum", max_sum), ("k_center", k_center)):
        order = walk(tokens, pivot, settings["k"], mask)
        outputs[f"{name}_indices"] = order[0]
        outputs[f"kept_sorted_{name}"] = chosen(order, torch.tensor([settings["k"]]), mask)[0].nonzero().flatten()
        for fewer in settings["also_check_prefixes"]:
            assert torch.equal(walk(tokens, pivot, fewer, mask), order[:, :fewer])
    if settings["layout"] == "video":
        frames, size = attention.shape
        outputs["frame_best"] = best(attention, torch.ones_like(attention).bool()) + size * torch.arange(frames)
    return {name: (value, 0.0, 0.0) for name, value in outputs.items()}


def relevant(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    """The stored matrix becomes queries whose products with unit keys have it for a softmax."""
    attention, kind = tensors["attention"], tensors["token_type"]
    length = attention.shape[-1]
    visual, text, valid = kind == 1, kind == 2, torch.ones_like(kind).bool()
    keys = torch.eye(length).expand(*attention.shape)
    call = AttentionCall(attention.clamp(min=1e-30).log(), keys, None, 1.0, True)
    rows = QueryRows(valid, visual, text, length, torch.full((len(kind), 1), length - 1), None)
    sums = Rows.GROUP_SUMS.read(call, rows)
    to_visual, to_text = shares(sums, visual, text)
    drop = torch.stack([parted(sums, visual, text, tau) for tau in settings["tau"]], dim=1)
    return {
        "alpha_text_to_visual": (to_visual, 0.0, 1e-6),
        "alpha_visual_to_text": (to_text, 0.0, 1e-6),
        "drop": (drop, 0.0, 0.0),
    }
