"""VisionZip: dominant tokens, contextual targets and the tokens of both kinds, in front of the projector of a LLaVA.

The class token is one of the released code's dominant tokens and the first of its output; here it never reaches the
LLM, so it is put in front of what the method kept. No query is stored: that of the class token is solved for from its
logits, which are linear in the stored keys.
"""

from __future__ import annotations

from typing import Any

import _replay as replay
import _towers as towers
import torch
from _replay import Attention, Outputs
from torch import Tensor

import vtc
from vtc.method.base import EncoderStage


def recorded(weights: Tensor, keys: Tensor) -> Attention:
    """The layer with `keys` [B, H, T, d] whose class token pays `weights` [B, H, T]."""
    keys = keys.double()
    known = torch.cat([keys, torch.ones_like(keys[..., :1])], dim=-1)
    solved = torch.linalg.lstsq(known, weights.double().log()[..., None]).solution[..., :-1, 0]
    query = torch.zeros_like(keys).index_copy(2, torch.tensor([0]), solved[:, :, None])
    return Attention(query.float(), keys.float())


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, hidden = replay.settings(case), tensors["in.hidden"]
    images, heads, keep = len(hidden), tensors["in.keys"].shape[1], settings["total_tokens"] - 1
    share = settings["dominant_patches"] / keep
    tower = towers.build("llava", 8, hidden.shape[2], crops=images, heads=heads, layers=4)
    run = tower.run(
        vtc.create("visionzip", share=share, before="projector", layout="official"), keep=keep,
        attention={2: recorded(tensors["in.cls_attn"], tensors["in.keys"])}, projected=hidden[:, 1:],
    )  # fmt: skip
    # In the order of the picture all kept tokens are anchors; with nothing else to spend, only the dominant ones stay.
    view, _ = run.at(EncoderStage(3))
    both = replay.again(vtc.create("visionzip", share=share, before="projector"), view, keep=keep)
    dominant = vtc.create("visionzip", share=1.0, before="projector")
    best = replay.again(dominant, view, keep=settings["dominant_patches"])

    def places(keep: Tensor) -> Tensor:
        return 1 + keep.nonzero()[:, 1].view(images, -1)

    return {
        "out.dominant_index": (torch.nn.functional.pad(places(best), (1, 0)), 0.0, 0.0),
        "out.contextual_target_index": (places(both & ~best), 0.0, 0.0),
        "out.tokens": (torch.cat([hidden[:, :1], run.inputs[0][:, 1:-1]], dim=1), 1e-5, 1e-5),
    }


CHECKS = {"in.keys": replay.Check(check, given=("in.",))}
