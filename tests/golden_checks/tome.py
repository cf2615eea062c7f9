"""ToMe: merged tokens, sizes, sources and copies back after an encoder block, with an r that is cut.

The case begins in the middle of an encoder, with tokens that already stand for several patches: the method is shown the
case's rows behind its second block, with the case's sizes as what the first left behind. It never sees the class token,
which the released code puts in front of its output, unchanged. Sources are read off merged unit vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import _replay as replay
import torch
from _replay import Outputs
from torch import Tensor

import vtc
from vtc.method.base import EncoderStage, Needs
from vtc.method.readings import AttentionCall
from vtc.method.states import States
from vtc.ops.merge import unmerge
from vtc.testing import make_view
from vtc.testing.views import CLIP_L


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    x, size, keys = tensors["in.x"], tensors["in.size"][..., 0], tensors["in.keys"]
    batch, count = x.shape[0], x.shape[1] - 1
    spec, block = replace(CLIP_L, encoder_stages=True), 1
    every = torch.arange(count).expand(batch, -1)

    def merged(r: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the rows `values` [B, N, C] in the order of the algorithm, and its sizes."""
        method = vtc.create("tome", inside=True, r=(0, r))
        ((layer, reading),) = [pair for pair in method.plan(spec).needs.vision_pairs if pair[0] == block]
        rows = reading.read(AttentionCall(keys, keys, None, 1.0, causal=False))[:, 1:]
        view = make_view([(8, 8)] * batch, spec=spec, vision={(layer, reading): list(rows)})
        assert Needs({layer: (reading,)}) == view.needs
        hidden = view.items.scatter(values, torch.zeros(*view.visual.shape, values.shape[2]))
        view = replace(view, states=States(hidden), stage=EncoderStage(block))
        assert method.select(view) is None  # the first block only begins
        view.memory[method, "rows"] = size[:, 1:], every
        answer = method.select(replace(view, stage=EncoderStage(block + 1)))
        assert answer is not None and answer.tokens is not None
        left = view.memory[method, "rows"][0]
        return answer.tokens[answer.keep].view(batch, -1, values.shape[2]), left

    outputs: Outputs = {}
    for r in replay.settings(case)["r_values"]:
        rows, sizes = merged(r, x[:, 1:])
        mixed, _ = merged(r, torch.eye(count).expand(batch, -1, -1))
        source = torch.nn.functional.pad(1 + mixed.argmax(1), (1, 0))
        rows = torch.cat([x[:, :1], rows], dim=1)
        outputs |= {
            f"out.r{r}.x": (rows, 1e-5, 1e-6),
            f"out.r{r}.size": (torch.cat([size[:, :1], sizes], dim=1)[..., None], 1e-5, 1e-6),
            f"out.r{r}.source": (source, 0.0, 0.0),
            f"out.r{r}.unmerged": (unmerge(rows, source), 1e-5, 1e-6),
        }
    return outputs


CHECKS = {"in.x": replay.Check(check, given=("in.",))}
