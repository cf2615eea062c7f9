"""VQToken: clustering with a fixed K, the elbow over all K, and the attention block, each through the method.

Starting tokens are drawn at random, so the case's stand in for the draws. Clusters are read off what the method sends
to the LLM: each row's anchor and the tokens that went into it. The case of the block stores a codebook and a map;
tokens that are the codes themselves, where the map says so, are clustered to just these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _replay as replay
import torch
from _replay import Outputs
from safetensors.torch import save_file
from torch import Tensor

import vtc
from vtc.method.base import Selection, StageView
from vtc.method.states import States
from vtc.methods.vqtoken import cluster
from vtc.methods.vqtoken.codebook import Clustering
from vtc.methods.vqtoken.method import OFFICIAL_PREFIX
from vtc.testing import make_view
from vtc.testing.views import CLIP_L, Shape

FIXED = {"max_iter": "iterations", "tol": "tolerance"}
ELBOW = FIXED | {"K_min": "k_min", "max_K": "k_max", "method": "clusters", "elbow_mode": "elbow_rule"}
BLOCK = {"num_heads": "heads", "dim_feedforward": "inner"}
SIDE = 14


def shown(tokens: Tensor, **more: Any) -> StageView:
    """A video of SIDE x SIDE tokens a frame, [frames, places, D]."""
    view = make_view([Shape(((tokens.shape[0], SIDE, SIDE),))], **more)
    hidden = torch.zeros(*view.visual.shape, tokens.shape[2])
    return replace(view, states=States(view.items.scatter(tokens.flatten(0, 1)[None], hidden)))


def clustered(view: StageView, start: Callable[..., Tensor], options: dict[str, Any]) -> Outputs:
    """Everything about the clusters of a view; start: what gives the first centres."""
    tokens, assigned = view.tokens[0], list[Any]()

    def answered(**more: Any) -> Selection:
        method = vtc.create("vqtoken_codebook", empty="drop", **{"order": "cluster_id", **options, **more})
        once = (lambda *_: assigned[0]) if assigned else None  # the same clusters for every variant
        with replay.watched(cluster, "seed_centres", start), replay.watched(Clustering, "assign", once) as found:
            answer = method.select(view)
        assigned.extend(found)
        assert answer is not None and answer.tokens is not None and answer.merged_into is not None
        return answer

    def rows(answer: Selection) -> Tensor:
        return answer.tokens[answer.keep]  # type: ignore[index]

    def places(found: Tensor, among: Tensor) -> Tensor:
        """Which row of `among` each of the rows `found` is."""
        return (found[:, None] == among).all(2).long().argmax(1)

    raw, medoid = answered(codebook_space="raw"), answered(codebook_space="raw", representative="medoid")
    slots = raw.keep[0].nonzero().flatten()  # the anchors, in the order in which rows are laid on them
    labels = torch.searchsorted(slots, raw.merged_into[0])  # type: ignore[index]
    first = torch.stack([(labels == k).nonzero()[0, 0] for k in range(len(slots))])
    assert torch.equal(first.sort().values, slots)
    return {
        "labels": (labels.view(-1, SIDE * SIDE), 0.0, 0.0),
        "codebook": (rows(answered(codebook_space="normalized")), 0.0, 1e-5),
        "codebook_raw": (rows(raw), 0.0, 1e-5),
        "counts": (labels.bincount(), 0.0, 0.0),
        "medoid": (places(rows(medoid), tokens), 0.0, 0.0),
        "first_index": (first, 0.0, 0.0),
        "order_first": (places(rows(answered(codebook_space="raw", order="first")), rows(raw)), 0.0, 0.0),
    }


def fixed(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    start, view = tensors["init_indices"], shown(tensors["tokens"], keep=len(tensors["init_indices"]))
    with replay.watched(cluster, "kmeans") as runs:
        outputs = clustered(view, lambda *_, **__: start[None, None], replay.options(case, FIXED))
    return outputs | {"kmeans_centroids": (runs[0].centres[0, 0], 0.0, 1e-5)}


def adaptive(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, final = replay.settings(case), tensors["final_init_indices"]
    counts = torch.arange(settings["K_min"], settings["max_K"] + 1)
    starts = torch.nn.utils.rnn.pad_sequence(tensors["init_indices_flat"].split(counts.tolist()), batch_first=True)
    chosen = list[Tensor]()

    def start(tokens: Tensor, runs: Tensor, width: int, *_: Any, **__: Any) -> Tensor:
        if runs.shape[1] > 1:
            return starts[None]
        chosen.append(runs[0, 0])
        return torch.cat([final, final[:1].expand(width)])[None, None, :width]  # what lies behind takes no part

    with replay.watched(cluster, "distortion") as distortions:
        outputs = clustered(shown(tensors["tokens"]), start, replay.options(case, ELBOW))
    return outputs | {"distortions": (distortions[0][0], 1e-4, 0.0), "best_K": (chosen[0], 0.0, 0.0)}


def block(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    settings, numbers, codes = replay.settings(case), tensors["index_map"], tensors["codebook"]
    spec = replace(CLIP_L, width=settings["context_dim"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    start = torch.stack([(numbers.flatten() == k).nonzero()[0, 0] for k in range(settings["K"])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "official.safetensors"
        save_file({OFFICIAL_PREFIX + name: tensor for name, tensor in weights.items()}, path)
        options = {"grid": (SIDE, SIDE), "codebook_space": "raw", "weights": path, **replay.options(case, BLOCK)}
        method = vtc.create("vqtoken", **options)
        view = shown(codes[numbers], spec=spec, keep=settings["K"])
        with replay.watched(cluster, "seed_centres", lambda *_, **__: start[None, None]), torch.no_grad():
            answer = method.select(replace(view, module=method.module(spec)))
    return {"output": (answer.tokens[answer.keep], 1e-4, 2e-5)}


CHECKS = {
    "init_indices": replay.Check(fixed, given=("tokens", "init_indices")),
    "init_indices_flat": replay.Check(adaptive, given=("tokens", "init_indices_flat", "final_init_indices")),
    "index_map": replay.Check(block, given=("index_map", "codebook", "weights.")),
}
