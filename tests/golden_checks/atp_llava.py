"""ATP: scores, thresholds and masks of one module; losses and soft masks of the training; exact budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vtc.errors import BudgetError
from vtc.methods.atp import thresholds
from vtc.methods.atp.method import ThresholdModule
from vtc.ops.attention import attention_sums
from vtc.ops.rank import dense_rank

INPUTS = (
    *("query", "key", "token_type", "grid_index", "atp.layer4", "S_redundant"),
    *("masks", "logits", "mask_for_attention", "visual_positions"),
)


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    return {"case1": module, "case2": training, "case3": budget}[case["case"]](case["params"], tensors)


def place(index: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
    """Row and column [1, N] from the raster index, through the coordinates as the engine gives them."""
    everywhere = torch.arange(grid[0] * grid[1])[None]
    group = torch.zeros_like(everywhere)
    row = dense_rank((everywhere // grid[1]).float(), group, 0.01)
    col = dense_rank((everywhere % grid[1]).float(), group, 0.01)
    return row[:, index], col[:, index]


def module(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    """case1: one module on a 24 x 24 image."""
    assert (params["score_norm"], params["feature"], params["relu"]) == ("minmax", "pool", True)
    query, key, kind = tensors["query"][None], tensors["key"][None], tensors["token_type"][None]
    groups = torch.stack([kind == 2, kind == 1])
    sums = attention_sums(query, key, groups.float(), params["head_dim"] ** -0.5, causal=True)
    visual = groups[1, 0].nonzero().flatten()
    cross, own = (sums / groups.sum(2, keepdim=True))[..., visual]
    mask = torch.ones_like(own, dtype=torch.bool)
    scaled = [thresholds.min_max(score, mask) for score in (own, cross)]
    redundancy = thresholds.redundancy_score(*scaled)
    row, col = place(tensors["grid_index"], params["grid"])
    spatial = thresholds.spatial_score(row, col, params["strides"], params["lambda_sample"])
    learned = ThresholdModule(params["bins"], params["hidden"], relu=True)
    learned.load_state_dict({n.removeprefix("atp.layer4."): v for n, v in tensors.items() if n.startswith("atp.")})
    with torch.no_grad():
        theta_r, theta_s = learned(*scaled, mask)
    if not torch.allclose(redundancy[0].double(), tensors["S_redundant"].double(), rtol=1e-3, atol=1e-5):
        redundancy = redundancy * torch.nan  # an output here, but an input of case3, so it is compared on the spot
    soft = thresholds.soft_keep(redundancy, spatial, theta_r, theta_s, params["temperature"])
    hard = thresholds.hard_keep(redundancy, spatial, theta_r, theta_s, mask)
    return {
        "S_self": (own[0], 1e-4, 1e-7),
        "S_cross": (cross[0], 1e-4, 1e-7),
        "S_spatial": (spatial[0], 0.0, 1e-6),
        "theta_r": (theta_r[0], 0.0, 1e-5),
        "theta_s": (theta_s[0], 0.0, 1e-5),
        "soft_mask": (soft[0], 0.0, 1e-4),
        "hard_mask": (hard[0], 0.0, 0.0),
        "kept_grid_index": (tensors["grid_index"][hard[0]], 0.0, 0.0),
    }


def training(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    """case2: running product of the soft masks, the losses, and the soft mask inside attention."""
    near = (1e-4, 1e-6)
    assert params["mask_floor"] == thresholds.FLOOR
    layers, depth, target = params["layers"], params["num_decoder_layers"], params["target_tokens"]
    product = tensors["masks"].cumprod(0)
    kept = product.sum(2)  # [M, B]
    tokens = torch.full((kept.shape[1],), float(params["N0"]))
    push = thresholds.depth_loss(kept, tokens, layers)
    over_layers = thresholds.mean_over_layers(kept, tokens, layers, depth)
    means = {"layers": over_layers, "modules": kept.mean(0)}
    weights = torch.ones(len(tensors["logits"])).scatter(0, tensors["visual_positions"], tensors["mask_for_attention"])
    outputs = {
        "cumulative_masks": product,
        "kept": kept.mean(1),
        "L_atp": push,
        "masked_attention": thresholds.masked_softmax(tensors["logits"], weights),
    }
    for name, mean in means.items():
        distance = thresholds.target_loss(mean, target)
        outputs[f"avg_tokens_{name}"] = mean.mean()
        outputs[f"L_target_{name}"] = distance
        outputs[f"total_{name}"] = params["lambda_atp"] * push + params["lambda_target"] * distance
    return {name: (value, *near) for name, value in outputs.items()}


def budget(params: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    """case3: an exact count from a sampling grid and the best scores; the schedules lie in the description."""
    for entry in params["schedules"]:
        given = entry["n0"], entry["avg_tokens"], entry["layers"], entry["num_layers"]
        if entry["alpha"] is None:
            with pytest.raises(BudgetError, match="cannot be met"):
                thresholds.decay_counts(*given)
            continue
        assert thresholds.decay_counts(*given) == entry["kept"]
        assert abs(thresholds.decay(*given)[0] / entry["n0"] - entry["alpha"]) <= 1e-6
    score, index = tensors["S_redundant"][None], tensors["grid_index"]
    row, col = place(index, params["grid"])
    mask, keep = torch.ones_like(score, dtype=torch.bool), torch.tensor([params["k"]])
    grid = thresholds.sampling_grid(row, col, params["strides"], params["spatial_share"], keep, mask)
    assert torch.equal(grid, thresholds.on_grid(row, col, params["chosen_stride"]))
    kept = thresholds.budget_keep(score, grid, keep, mask)
    return {"kept_grid_index": (index[kept[0]], 0.0, 0.0), "spatial_grid_index": (index[grid[0]], 0.0, 0.0)}
