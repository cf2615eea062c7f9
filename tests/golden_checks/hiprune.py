"""HiPrune: kept tokens per budget on one tile, on five, at borders, and on Qwen2.5-VL with its scores and positions.

LLaVA cases store the mean attention that every layer pays; one of them queries and keys of the two layers too. Cuts are
closer than float32 sums of two orders, so these are compared with the stored means, which decide. The five tiles have
no margin in the release, so they run as a square picture, on a projector that hands on tile and number of each patch.
"""

from __future__ import annotations

from typing import Any

import _replay as replay
import _towers as towers
import torch
from _replay import Attention, Outputs
from torch import Tensor

import vtc
from vtc.method.readings import AttentionCall
from vtc.method.rows import Rows

OPTIONS = {"alpha": "alpha"}  # the published layers are the default
TEXT = 6  # five tokens of text and the mark in front of the image


def llava(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, mean, tiles = replay.settings(case), tensors["in.attn_colmean"], replay.settings(case)["num_tiles"]
    side, budgets, outputs = settings["row_stride"], settings["budgets_total"], Outputs()
    if tiles > 1:
        columns, rows = settings["crop_grid_w_h"]
        more = {"crops": tiles, "size": (800, 800), "image_grid_pinpoints": [[14 * rows * side, 14 * columns * side]]}
        tower = towers.build(
            "llava-next", side, 2, patch=14, tokens=tiles * side * side + rows * side, **more
        )  # a newline behind every row
    else:
        tower = towers.build("llava", side, 2)
    attention = {layer: replay.every_row(row) for layer, row in enumerate(replay.logits(mean)[:, :, None])}
    method, patches = vtc.create("hiprune", **replay.options(case, OPTIONS)), towers.numbered(tiles, side * side)
    with vtc.share_encoder(tower.model, [method]):
        runs = [tower.run(method, keep=each, attention=attention, projected=patches) for each in budgets]
    for run, budget in zip(runs, budgets, strict=True):
        tile, patch = run.inputs[0][0, 1:-1].long().unbind(1)
        kept = torch.zeros(tiles, side * side, dtype=torch.bool).index_put((tile, patch), torch.tensor(True))
        outputs[f"out.kept_{budget}"] = (kept, 0.0, 0.0)
        if tiles > 1:
            outputs |= {f"out.seq_tile_{budget}": (tile, 0.0, 0.0), f"out.seq_token_{budget}": (patch, 0.0, 0.0)}
    if "in.q_object" in tensors:
        for name, layer in zip(("object", "deep"), method.layers(runs[0].at(0)[0].model), strict=True):
            query, key, scaling = stored(tensors, name)
            received = Rows.RECEIVED.read(AttentionCall(query, key, None, scaling, causal=False))
            assert torch.allclose(received, mean[layer], rtol=1e-5, atol=0.0)
    return outputs


def stored(tensors: dict[str, Tensor], name: str) -> Attention:
    query, key = tensors[f"in.q_{name}"][None], tensors[f"in.k_{name}"][None]
    return Attention(query, key, query.shape[-1] ** -0.5)


def qwen(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, grid, outputs = replay.settings(case), tensors["in.grid_thw"], Outputs()
    after = tensors["in.position_ids"].shape[1] - TEXT - len(tensors["in.window_index"])
    tower = towers.qwen(settings["num_layers"], (7, 15, 23, 31), settings["num_heads"], grid, TEXT, after)
    layers = {"object": settings["object_layer_1based"] - 1, "deep": settings["deep_layer_index"]}
    attention = {layer: stored(tensors, name) for name, layer in layers.items()}
    for ratio in settings["retention_ratios"]:
        exact, official = (
            tower.run(
                vtc.create("hiprune", collision=collision, **replay.options(case, OPTIONS)), retention=ratio,
                attention=attention,
            )
            for collision in ("exact", "official")
        )  # fmt: skip
        assert len(exact.kept[0]) == case["details"][str(ratio)]["requested_budget"]
        label = str(ratio).replace(".", "p")
        outputs[f"out.kept_{label}"] = (official.kept[0], 0.0, 0.0)
        outputs[f"out.position_ids_{label}"] = (official.positions[0][0][-3:, 0], 0.0, 0.0)
    view, _ = exact.at(0)
    for name, layer in zip(layers, vtc.create("hiprune").layers(view.model), strict=True):  # type: ignore[attr-defined]
        score = view.vision_attention(layer)[0] * grid.prod()  # stored as sums over the queries
        outputs[f"out.score_{name}"] = (score, 1e-5, 0.0)
    return outputs


CHECKS = {
    "in.attn_colmean": replay.Check(llava, given=("in.",)),
    "in.window_index": replay.Check(qwen, given=("in.",)),
}
