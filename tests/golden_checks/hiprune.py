"""HiPrune: kept tokens per budget on one tile, on five, at borders, and on Qwen2.5-VL with its scores and positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.method.base import ModelSpec, Rows
from vtc.method.readings import AttentionCall
from vtc.methods.hiprune.method import HiPrune, anchors_of
from vtc.methods.hiprune.neighbours import hierarchical, neighbours, tile_places
from vtc.ops.select import apportion, take_last

CLIP_L = ModelSpec("llava", 24, 22, True, tuple(range(24)), 32)
QWEN = ModelSpec("qwen2.5-vl", 32, 31, False, (7, 15, 23, 31), 36, mrope=True)
Outputs = dict[str, tuple[Tensor, float, float]]


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    if case["case"] in ("case1", "case2", "case3"):
        return _llava(case, tensors)
    if case["case"] in ("case4_qwen", "case5_qwen_collision"):
        return _qwen(case, tensors)
    raise ValueError(f"unknown case {case['case']}")


def _method(case: dict[str, Any], spec: ModelSpec) -> HiPrune:
    """The method, whose default layers must be the published ones."""
    settings = case["hyper_parameters"]
    method = vtc.create("hiprune", alpha=settings["alpha"])
    assert isinstance(method, HiPrune)
    assert spec.vision_layers == settings["num_layers"]
    assert method.layers(spec) == (settings["object_layer_1based"] - 1, settings["deep_layer_index"])
    return method


def _received(query: Tensor, key: Tensor) -> Tensor:
    """[1, T] mean over heads and queries of what each of T keys receives."""
    attention = AttentionCall(query[None], key[None], None, query.shape[-1] ** -0.5, causal=False)
    return Rows.RECEIVED.read(attention)


def _llava(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings = case["hyper_parameters"]
    method = _method(case, CLIP_L)
    scores = [tensors["in.attn_colmean"][layer] for layer in method.layers(CLIP_L)]
    for index, name in enumerate(["object", "deep"]):
        if f"in.q_{name}" in tensors:
            # The cuts are closer than float32 sums of two orders, so the stored means decide where both agree.
            found = _received(tensors[f"in.q_{name}"], tensors[f"in.k_{name}"])
            scores[index] = torch.where((found - scores[index]).abs() <= 1e-5 * found, scores[index], found)
    middle, deep = (each[:, 1:] for each in scores)

    # Tokens in the order of the prompt: the thumbnail, then the crops stitched to one map, row by row.
    tiles, side = settings["num_tiles"], settings["row_stride"]
    columns, rows = settings["crop_grid_w_h"] or (0, 0)
    place = torch.cartesian_prod(torch.arange(rows * side), torch.arange(columns * side))
    stitched = 1 + place[:, 0] // side * columns + place[:, 1] // side
    group = torch.cat([torch.zeros(side * side).long(), stitched])[None]
    patches = torch.arange(side * side)
    patch = torch.cat([patches, place[:, 0] % side * side + place[:, 1] % side])[None]
    row, col, every = patch // side, patch % side, torch.ones_like(group, dtype=torch.bool)
    near = neighbours(group, *tile_places(group, row.float(), col.float(), every), every, method.border)

    outputs: Outputs = {}
    for budget in settings["budgets_total"]:
        share = apportion(torch.tensor([budget]), torch.full((1, tiles), side * side))
        about, anchors = case["details"][str(budget)], anchors_of(share, method.alpha)
        assert share[0].tolist() == about["kept_per_tile"] == [about["per_tile_budget"]] * tiles
        assert anchors[0].tolist() == [about["anchors_per_tile"]] * tiles
        keep = hierarchical(middle[group, patch], deep[group, patch], near, group, share, anchors, every)
        by_tile = torch.zeros(tiles, side * side, dtype=torch.bool)
        outputs[f"out.kept_{budget}"] = (by_tile.index_put((group, patch), keep), 0.0, 0.0)
        if tiles > 1:
            outputs[f"out.seq_tile_{budget}"] = (group[keep], 0.0, 0.0)
            outputs[f"out.seq_token_{budget}"] = (patch[keep], 0.0, 0.0)
    return outputs


def _qwen(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings = case["hyper_parameters"]
    method = _method(case, QWEN)
    rows, cols = settings["merged_grid_h_w"]
    patches, merged = 4 * rows * cols, settings["spatial_merge_size"] ** 2
    scores = []
    for name in ("object", "deep"):
        groups = _received(tensors[f"in.q_{name}"], tensors[f"in.k_{name}"]).view(-1, merged).mean(1)
        scores.append(torch.empty_like(groups).index_copy(0, tensors["in.window_index"], groups)[None])
    outputs: Outputs = {
        "out.score_object": (scores[0][0] * patches, 1e-5, 0.0),  # stored as sums over the queries
        "out.score_deep": (scores[1][0] * patches, 1e-5, 0.0),
    }
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()
    every = torch.ones(1, rows * cols, dtype=torch.bool)
    group = torch.zeros(1, rows * cols, dtype=torch.long)
    near = neighbours(group, *tile_places(group, place[None, :, 0], place[None, :, 1], every), every, method.border)
    positions, first = tensors["in.position_ids"], 6  # five tokens of text and the mark in front of the image
    official = torch.full((1, 1), 1 / patches)
    for ratio in settings["retention_ratios"]:
        about = case["details"][str(ratio)]
        share = torch.tensor([[vtc.tokens_to_keep(rows * cols, ratio)]])
        anchors = anchors_of(share, method.alpha)
        assert (int(share), int(anchors)) == (about["requested_budget"], about["anchors"])
        exact = hierarchical(*scores, near, group, share, anchors, every)
        assert int(exact.sum()) == about["requested_budget"]
        keep = hierarchical(*scores, near, group, share, anchors, every, official)
        text = torch.ones(1, positions.shape[1], dtype=torch.bool)
        text[:, first : first + rows * cols] = keep
        label = str(ratio).replace(".", "p")
        outputs[f"out.kept_{label}"] = (keep[0].nonzero().flatten(), 0.0, 0.0)
        left = text[0].nonzero().T
        outputs[f"out.position_ids_{label}"] = (take_last(positions[:, None], left)[:, 0], 0.0, 0.0)
    return outputs
