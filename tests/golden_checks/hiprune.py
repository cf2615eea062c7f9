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
from vtc import adapters
from vtc.method.readings import AttentionCall, Rows

OPTIONS = {"alpha": "alpha"}  # the published layers are the default
TOKENS = 6  # five tokens of text and the mark in front of the image


def llava(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, mean = replay.settings(case), tensors["in.attn_colmean"]
    side, tiles = settings["row_stride"], settings["num_tiles"]
    more: dict[str, Any] = {}
    inputs = {"pixel_values": towers.pixels(tiles, 3, 14 * side, 14 * side)}
    count = tiles * side * side
    if tiles > 1:
        columns, rows = settings["crop_grid_w_h"]
        more["image_grid_pinpoints"] = [[rows * 14 * side, columns * 14 * side]]
        inputs |= {"image_sizes": torch.tensor([[800, 800]]), "pixel_values": inputs["pixel_values"][None]}
        count += rows * side  # a newline behind every row
    model = towers.build("llava" if tiles == 1 else "llava-next", side, width=2, patch=14, **more)
    adapter = adapters.of(model)
    attention = {
        layer: replay.even_rows(row[:, None]) for layer, row in zip(adapter.vision_attention, mean, strict=True)
    }
    patches = torch.cartesian_prod(torch.arange(tiles), torch.arange(side * side)).view(tiles, -1, 2).float()
    method = vtc.create("hiprune", **replay.options(case, OPTIONS))
    recorded = {"attention": attention, "entering": {adapter.projector: patches}}
    budgets, outputs = settings["budgets_total"], Outputs()
    with vtc.share_encoder(model, [method]):
        runs = [replay.run(model, towers.prompt(count) | inputs, method, keep=each, **recorded) for each in budgets]
    for run, budget in zip(runs, budgets, strict=True):
        tile, patch = run.inputs[0][0, 1:-1].long().unbind(1)
        kept = torch.zeros(tiles, side * side, dtype=torch.bool).index_put((tile, patch), torch.tensor(True))
        assert kept.sum(1).tolist() == case["details"][str(budget)]["kept_per_tile"]
        outputs[f"out.kept_{budget}"] = (kept, 0.0, 0.0)
        if tiles > 1:
            outputs |= {f"out.seq_tile_{budget}": (tile, 0.0, 0.0), f"out.seq_token_{budget}": (patch, 0.0, 0.0)}
    for name, layer in (("object", settings["object_layer_1based"] - 1), ("deep", settings["deep_layer_index"])):
        if f"in.q_{name}" in tensors:
            query, key, scaling = stored(tensors, name)
            received = Rows.RECEIVED.read(AttentionCall(query, key, None, scaling, causal=False))
            if not torch.allclose(received, mean[layer], rtol=1e-5, atol=0.0):
                outputs = {label: (value.new_zeros(0), 0.0, 0.0) for label, (value, *_) in outputs.items()}
    return outputs


def stored(tensors: dict[str, Tensor], name: str) -> Attention:
    query, key = tensors[f"in.q_{name}"][None], tensors[f"in.k_{name}"][None]
    return Attention(query, key, query.shape[-1] ** -0.5)


def qwen(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, before = replay.settings(case), tensors["in.position_ids"].shape[1]
    model = towers.qwen(settings["num_layers"], (7, 15, 23, 31), settings["num_heads"])
    layers = adapters.of(model).vision_attention
    places = settings["object_layer_1based"] - 1, settings["deep_layer_index"]
    attention = {layers[at]: stored(tensors, name) for at, name in zip(places, ("object", "deep"), strict=True)}
    grid = tensors["in.grid_thw"]
    patches, tokens = int(grid.prod()), int(grid.prod()) // settings["spatial_merge_size"] ** 2
    inputs = towers.prompt(tokens, before=TOKENS, after=before - TOKENS - tokens)
    inputs["input_ids"][0, TOKENS - 1] = towers.START
    inputs |= {"mm_token_type_ids": (inputs["input_ids"] == towers.IMAGE).int(), "image_grid_thw": grid}
    inputs["pixel_values"] = towers.pixels(patches, 3 * 2 * 14 * 14)
    outputs: Outputs = {}
    for ratio in settings["retention_ratios"]:
        about, label = case["details"][str(ratio)], str(ratio).replace(".", "p")
        for collision in ("exact", "official"):
            method = vtc.create("hiprune", collision=collision, **replay.options(case, OPTIONS))
            run = replay.run(model, inputs, method, retention=ratio, attention=attention)
            assert collision == "official" or len(run.kept[0]) == about["requested_budget"]
        outputs[f"out.kept_{label}"] = (run.kept[0], 0.0, 0.0)
        outputs[f"out.position_ids_{label}"] = (run.positions[0][0][-3:, 0], 0.0, 0.0)
    for name, layer in zip(("object", "deep"), method.layers(run.view(0).model), strict=True):  # type: ignore[attr-defined]
        score = run.view(0).vision_attention(layer)[0] * patches  # stored as sums over the queries
        outputs[f"out.score_{name}"] = (score, 1e-5, 0.0)
    return outputs


CHECKS = {
    "in.attn_colmean": replay.Check(llava, given=("in.",)),
    "in.window_index": replay.Check(qwen, given=("in.",)),
}
