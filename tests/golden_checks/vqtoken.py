"""Golden cases of VQToken: clustering with a fixed K, the elbow over all K, and the attention block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtc.methods.vqtoken.attention import VQAttention
from vtc.methods.vqtoken.cluster import codebook, describe, distortion, elbow, kmeans, medoids, ordering

INPUTS = {
    "case1": ("tokens", "init_indices"),
    "case2": ("tokens", "init_indices_flat", "final_init_indices"),
    "case3": ("index_map", "codebook"),
}
Outputs = dict[str, tuple[Tensor, float, float]]


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    if case["case"] == "case1":
        return fixed(case["params"], tensors["tokens"], tensors["init_indices"])
    if case["case"] == "case2":
        return adaptive(case["params"], tensors)
    if case["case"] == "case3":
        return attention(case["params"], tensors)
    raise AssertionError(f"case {case['case']!r} is not known here")


def fixed(params: dict[str, Any], tokens: Tensor, start: Tensor) -> Outputs:
    frames, places, _ = tokens.shape
    flat, mask = tokens.flatten(0, 1)[None], torch.ones(1, frames * places, dtype=torch.bool)
    clusters = len(start)
    options = {"iterations": params["max_iter"], "tolerance": params["tol"]}
    found = kmeans(flat, start[None, None], torch.tensor([[clusters]]), mask, **options)
    assert bool(found.converged)
    labels = found.labels[:, 0]
    members = describe(labels, clusters, mask)
    return {
        "labels": (labels.view(frames, places), 0, 0),
        "kmeans_centroids": (found.centres[0, 0], 0, 1e-5),
        "codebook": (codebook(flat, labels, clusters, mask, normalized=True)[0][0], 0, 1e-5),
        "codebook_raw": (codebook(flat, labels, clusters, mask, normalized=False)[0][0], 0, 1e-5),
        "counts": (members.sizes[0], 0, 0),
        "medoid": (medoids(flat, labels, clusters, mask)[0], 0, 0),
        "first_index": (members.first[0], 0, 0),
        "order_first": (ordering(members)[0], 0, 0),
    }


def adaptive(params: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    """All candidates as the runs of one call, then the chosen number from its own start."""
    tokens, least, most = tensors["tokens"], params["K_min"], params["max_K"]
    flat, mask = tokens.flatten(0, 1)[None], torch.ones(1, tokens.shape[0] * tokens.shape[1], dtype=torch.bool)
    counts = torch.arange(least, most + 1)
    starts = torch.nn.utils.rnn.pad_sequence(tensors["init_indices_flat"].split(counts.tolist()), batch_first=True)
    options = {"iterations": params["max_iter"], "tolerance": params["tol"]}
    distortions = distortion(flat, kmeans(flat, starts[None], counts[None], mask, **options), mask)
    best = elbow(distortions, least, rule=params["elbow_mode"])
    outputs = fixed(params, tokens, tensors["final_init_indices"])
    del outputs["kmeans_centroids"]
    return outputs | {"distortions": (distortions[0], 1e-4, 0), "best_K": (best[0], 0, 0)}


@torch.no_grad()
def attention(params: dict[str, Any], tensors: dict[str, Tensor]) -> Outputs:
    block = VQAttention(
        params["query_dim"], params["context_dim"], heads=params["num_heads"], inner=params["dim_feedforward"]
    ).eval()
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    block.load_state_dict(weights)
    found = block(tensors["index_map"][None], tensors["codebook"][None])
    return {"output": (found[0], 1e-4, 2e-5)}
