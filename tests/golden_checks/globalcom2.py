"""GlobalCom2: retention per crop, thumbnail order, kept patches of every crop, and the whole sequence as released.

The cases run as a LLaVA-NeXT would, from the size of the picture on. The projector hands on tile and number of each
patch, and newlines are -1, so that the rows which enter the LLM spell the released sequence. The method grants whole
tokens: where R times the tokens is no whole number, the retention of the crops is compared per R.
"""

from __future__ import annotations

from typing import Any

import _replay as replay
import _towers as towers
import torch
from _replay import Attention, Outputs
from torch import Tensor

import vtc
from vtc.methods.globalcom2 import crops

OPTIONS = {"temperature": "tau"}
HEADS = 4


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, computed, outputs = replay.settings(case), "in.hidden" in tensors, Outputs()
    side, tiles, (width, height) = settings["patches_per_side"], settings["num_tiles"], settings["image_size_w_h"]
    detail = next(iter(case["details"].values()))
    columns, rows = detail["valid_w_h"]
    tokens = side * side + columns * rows
    tower = towers.build(
        "llava-next", side, 2 * HEADS, crops=tiles, tokens=tokens + rows, size=(height, width), patch=14, heads=HEADS,
        image_grid_pinpoints=[[h, w] for w, h in settings["grid_pinpoints_w_h"]],
    )  # fmt: skip
    torch.nn.init.constant_(tower.model.model.image_newline, -1.0)
    row = torch.nn.functional.pad(tensors["in.cls_logits"], (1, 0))[:, None].expand(-1, HEADS, -1)
    recorded: dict[str, Any] = {"attention": {23: projected(tensors) if computed else replay.class_row(row)}}
    recorded["projected"] = towers.numbered(tiles, side * side, 2 * HEADS)
    method = vtc.create("globalcom2", layout="official", exact_total=False, **replay.options(case, OPTIONS))
    ratios, lines = settings["retention_ratios"], detail["newline_tokens"]
    granted = [round(ratio * tokens) for ratio in ratios]
    with vtc.share_encoder(tower.model, [method]), replay.watched(crops, "crop_ratios") as shares:
        runs = [tower.run(method, keep=keep + lines, **recorded) for keep in granted]
    for ratio, keep, share, run in zip(ratios, granted, shares, runs, strict=True):
        tile, token = run.inputs[0][0, 1:-1, :2].long().unbind(1)
        marks = torch.zeros(tiles, side * side, dtype=torch.bool)
        marks[tile[tile >= 0], token[tile >= 0]] = True
        found = {
            "thumb": token[: int((tile == 0).sum())],
            "crop_kept": marks[1:],
            "seq_tile": tile,
            "seq_token": token,
        }
        label = str(ratio).replace(".", "p")
        outputs |= {f"out.{name}_{label}": (value, 0.0, 0.0) for name, value in found.items()}
        # Sums of 500 float32 products, or the stored numbers themselves.
        scales = share[0, 1:] / keep * (ratio * tokens)
        outputs[f"out.scales_{label}"] = (scales, 1e-5 if computed else 1e-12, 0.0)
    return outputs


def projected(tensors: dict[str, Tensor]) -> Attention:
    """Queries and keys of the last layer from what entered its attention module."""
    query, key = (
        torch.nn.functional.linear(tensors["in.hidden"], tensors[f"in.{each}_weight"], tensors[f"in.{each}_bias"])
        .unflatten(2, (HEADS, -1))
        .transpose(1, 2)
        for each in "qk"
    )
    return Attention(query, key, query.shape[-1] ** -0.5)


CHECKS = {"in.cls_logits": replay.Check(check, given=("in.",))}
