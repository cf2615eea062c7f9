"""ToDRE: pivots and orders of both variants on an image and a video, and the decisions of the second stage.

Stage 1 runs on a LLaVA or a LLaVA-NeXT-Video whose projector hands on the case's tokens; the order is that
of the walk it asks for. Stage 2 runs on an LLM in which one layer has the case's attention, a prompt of the case a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import _llm as llm
import _replay as replay
import _towers as towers
import torch
from _replay import Outputs
from torch import Tensor

import vtc
from vtc.methods import todre


def diverse(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, tokens, attention = replay.settings(case), tensors["tokens"], tensors["cls_attention"]
    tokens, attention = tokens.view(-1, *tokens.shape[-2:]), attention.view(-1, attention.shape[-1])
    frames, count, width = tokens.shape
    side, video = round(count**0.5), settings["layout"] == "video"
    if video:  # two by two patches make a token of a frame
        tower = towers.build("llava-next-video", 2 * side, width, crops=frames, tokens=frames * count)
        attention = attention.view(frames, side, side).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)
    else:
        tower = towers.build("llava", side, width)
    row = replay.class_row(replay.logits(torch.nn.functional.pad(attention, (1, 0), value=1.0))[:, None])
    method = vtc.create("todre", relevance=False)
    run = tower.run(method, keep=settings["k"], attention={23: row}, projected=tokens)
    (view, _), found = run.at(0), dict[str, Tensor]()
    for variant in ("max_sum", "k_center"):
        method = vtc.create("todre", relevance=False, variant=variant)
        with replay.watched(todre, variant) as orders:
            found[f"kept_sorted_{variant}"] = replay.again(method, view, keep=settings["k"])[0].nonzero().flatten()
        found[f"{variant}_indices"] = orders[0][0]
    assert torch.equal(run.kept[0], found["kept_sorted_max_sum"])
    for name, pivot in (("pivot", "cls"), ("pivot_center", "center"), ("pivot_farthest", "farthest")):
        method = vtc.create("todre", relevance=False, pivot=pivot)
        found[name] = replay.again(method, view, keep=1)[0].nonzero()[0, 0]
    if video:
        found["frame_best"] = best_of_frames(view, frames, count)
    return {name: (value, 0.0, 0.0) for name, value in found.items()}


def best_of_frames(view: Any, frames: int, count: int) -> Tensor:
    """The pivot of every frame alone: what is picked where the others are no tokens of the item."""
    method, found = vtc.create("todre", relevance=False), []
    for frame in range(frames):
        inside = view.crop == frame
        moved = torch.arange(view.hidden.shape[1]).expand(view.hidden.shape[:2])
        alone = replace(view, items=view.items.kept(inside, (count,), moved))
        found.append(alone.items.token[replay.again(method, alone, keep=1)])
    return torch.cat(found)


def relevant(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, attention, kind = replay.settings(case), tensors["attention"], tensors["token_type"]
    heads, length = attention.shape[1:3]
    drop, alphas = [], []
    for matrix, kinds in zip(attention, kind, strict=True):
        image = int((kinds == 1).sum())
        start, system = int((kinds == 1).nonzero()[0]), int((kinds == 0).sum())
        model = llm.bare(image=image, layers=16, heads=heads)
        fired = []
        for tau in settings["tau"]:
            method = vtc.create("todre", diversity=False, tau=tau)
            with replay.watched(todre, "shares") as shares:
                run = llm.run(
                    model, llm.numbered(length), start=start, image=image, method=method, system_length=system,
                    attention={14: replay.all_rows(replay.logits(matrix[None]))},
                )  # fmt: skip
            fired.append(len(run.kept[15]) == 0)
            assert fired[-1] or len(run.kept[15]) == image
        drop.append(fired)
        alphas.append(torch.cat(shares[-1]))
    to_visual, to_text = torch.stack(alphas).unbind(1)
    return {
        "alpha_text_to_visual": (to_visual, 0.0, 1e-6),
        "alpha_visual_to_text": (to_text, 0.0, 1e-6),
        "drop": (torch.tensor(drop), 0.0, 0.0),
    }


CHECKS = {
    "cls_attention": replay.Check(diverse, given=("tokens", "cls_attention")),
    "token_type": replay.Check(relevant, given=("attention", "token_type")),
}
