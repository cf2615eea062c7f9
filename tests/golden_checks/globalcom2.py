"""GlobalCom2: retention per crop, thumbnail order, kept patches of every crop, and the whole sequence as released.

The cases hold scores of all tiles and the size of the image in pixels. They run as a LLaVA-NeXT would: the image's
geometry from the adapter, scores packed to tokens, and the functions that the method is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.method.readings import AttentionCall, Rows
from vtc.methods.globalcom2 import crops
from vtc.ops.select import top_k_of_groups

SIDE = 24


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    settings = case["hyper_parameters"]
    assert case["case"] in ("case1", "case2", "case3")
    assert settings["patches_per_side"] == SIDE
    width, height = settings["image_size_w_h"]
    computed = "in.hidden" in tensors
    logits = _logits(tensors, heads=4) if computed else tensors["in.cls_logits"]
    limit = {"scales": 1e-5 if computed else 1e-12}  # sums of 500 float32 products, or the stored numbers themselves
    detail = next(iter(case["details"].values()))
    columns, rows = detail["crop_grid_w_h"]
    tile, place = _unpadded(rows, columns, height, width)
    group = torch.cat([torch.zeros(SIDE * SIDE, dtype=torch.long), tile])[None]
    place = torch.cat([torch.arange(SIDE * SIDE), place])[None]
    outputs: dict[str, tuple[Tensor, float, float]] = {}
    for ratio in settings["retention_ratios"]:
        for name, value in _run(logits, group, place, (rows, columns), ratio, settings["temperature"]).items():
            outputs[f"out.{name}_{str(ratio).replace('.', 'p')}"] = (value, limit.get(name, 0.0), 0.0)
    return outputs


def _logits(tensors: dict[str, Tensor], heads: int) -> Tensor:
    """[tiles, P] head-mean logits of the class token from the input of the attention module."""
    x = tensors["in.hidden"]
    query, key = (
        torch.nn.functional.linear(x, tensors[f"in.{each}_weight"], tensors[f"in.{each}_bias"])
        .unflatten(2, (heads, -1))
        .transpose(1, 2)
        for each in "qk"
    )
    call = AttentionCall(query, key, None, query.shape[-1] ** -0.5, causal=False)
    return Rows.CLS_LOGITS.read(call)[:, 1:]


def _unpadded(rows: int, columns: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Tile (from 1) and number inside its full square of every token that LLaVA-NeXT leaves of the stitched map."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    stitched = torch.arange(rows * SIDE * columns * SIDE).view(1, rows * SIDE, columns * SIDE)
    flat = unpad_image(stitched, (height, width)).flatten()
    row, column = flat // (columns * SIDE), flat % (columns * SIDE)
    return 1 + row // SIDE * columns + column // SIDE, row % SIDE * SIDE + column % SIDE


def _run(
    logits: Tensor, group: Tensor, place: Tensor, tiling: tuple[int, int], ratio: float, tau: float
) -> dict[str, Tensor]:
    tiles = len(logits)
    mask, z = torch.ones_like(group, dtype=torch.bool), logits[group, place]
    overview = logits[:1].view(1, SIDE, SIDE)
    sums = torch.nn.functional.pad(crops.cell_sums(overview, tiling), (1, 0))
    guided = torch.arange(tiles)[None] > 0
    ratios = crops.crop_ratios(sums, guided, torch.tensor([ratio], dtype=torch.float64), tau)
    sizes = crops.group_sums(torch.ones_like(z), group, tiles, mask).long()
    shares = crops.floored_shares(ratios, sizes, torch.tensor([0]))
    rows = _rows(group, place, tiling)
    overall = crops.stretch(overview, (rows, int((group > 0).sum()) // rows))
    overall = torch.cat([torch.zeros(1, SIDE * SIDE), overall.flatten(1)], dim=1)
    scores = torch.where(group == 0, z, crops.blend(z, overall, group, tiles, mask, 0.5))
    kept = top_k_of_groups(scores, group, shares, mask)
    order = crops.released_order(kept, scores, group, tiling, (SIDE, SIDE))[0]
    order = order[: int(kept.sum()) + tiling[0] * SIDE]
    newlines = torch.full((tiling[0] * SIDE,), -1)
    marks = torch.zeros(tiles - 1, SIDE * SIDE, dtype=torch.bool)
    marks[group[kept][group[kept] > 0] - 1, place[kept][group[kept] > 0]] = True
    return {
        "scales": ratios[0, 1:],
        "thumb": place[0][order[: int(shares[0, 0])]],
        "crop_kept": marks,
        "seq_tile": torch.cat([group[0], newlines])[order],
        "seq_token": torch.cat([place[0], newlines])[order],
    }


def _rows(group: Tensor, place: Tensor, tiling: tuple[int, int]) -> int:
    """Rows of the stitched map."""
    row = (group - 1) // tiling[1] * SIDE + place // SIDE
    return len(row[group > 0].unique())
