"""ToMe: merged tokens, sizes, sources and copies back, with a protected class token and an r that is cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtc.ops.merge import bipartite_merge, merge_rows, unmerge


def check(case: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, float, float]]:
    assert case["case"] == "case1"
    assert case["hyper_parameters"]["class_token"]
    x, size, keys = tensors["in.x"], tensors["in.size"], tensors["in.keys"].mean(1)
    batch, count, _ = x.shape
    outputs: dict[str, tuple[Tensor, float, float]] = {}
    for r in case["hyper_parameters"]["r_values"]:
        merge = bipartite_merge(keys, [count] * batch, [[r]] * batch, size=size[..., 0], order="index", protected=1)
        rows = merge_rows(x, merge.target, merge.weight, merge.counts[0])
        outputs |= {
            f"out.r{r}.x": (rows, 1e-5, 1e-6),
            f"out.r{r}.size": (merge.size[..., None], 1e-5, 1e-6),
            f"out.r{r}.source": (merge.target, 0.0, 0.0),
            f"out.r{r}.unmerged": (unmerge(rows, merge.target), 1e-5, 1e-6),
        }
    return outputs
