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
from vtc import adapters
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
    dominant, contextual = settings["dominant_patches"], settings["contextual"]
    images, count, width = hidden.shape[0], hidden.shape[1] - 1, hidden.shape[2]
    model = towers.build("llava", 8, width=width, heads=tensors["in.keys"].shape[1], layers=4)
    adapter = adapters.of(model)
    inputs = towers.prompt(count, images) | {"pixel_values": towers.pixels(images, 3, 8, 8)}
    replayed: dict[str, Any] = {
        "attention": {adapter.vision_attention[2]: recorded(tensors["in.cls_attn"], tensors["in.keys"])},
        "entering": {adapter.projector: hidden[:, 1:]},
    }
    share = dominant / (dominant + contextual)
    method = vtc.create("visionzip", share=share, before="projector", layout="official")
    run = replay.run(model, inputs, method, keep=dominant + contextual, **replayed)
    # In the order of the picture all kept tokens are anchors; with nothing else to spend, only the dominant ones stay.
    view = run.view(EncoderStage(3))
    both = replay.again(vtc.create("visionzip", share=share, before="projector"), view, keep=dominant + contextual).keep
    best = replay.again(vtc.create("visionzip", share=1.0, before="projector"), view, keep=dominant).keep

    def places(keep: Tensor) -> Tensor:
        return 1 + keep.nonzero()[:, 1].view(images, -1)

    return {
        "out.dominant_index": (torch.nn.functional.pad(places(best), (1, 0)), 0.0, 0.0),
        "out.contextual_target_index": (places(both & ~best), 0.0, 0.0),
        "out.tokens": (torch.cat([hidden[:, :1], run.inputs[0][:, 1:-1]], dim=1), 1e-5, 1e-5),
    }


CHECKS = {"in.keys": replay.Check(check, given=("in.",))}
