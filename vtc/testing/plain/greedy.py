"""Greedy choices from their definitions: every step computes sums, minima and determinants from scratch in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtc.ops.greedy import best, chosen, greedy_map, k_center, max_sum, most_isolated
from vtc.ops.select import in_groups
from vtc.ops.similarity import alignment, alignments, cosine_to_mean, products, total
from vtc.testing.plain import OpCase, Size


def cosines(x: Tensor) -> list[list[float]]:
    """[N, N] cosines of the rows of x in float64, 0 with a zero vector."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True).clamp(min=1e-300)
    return (unit @ unit.T).tolist()  # type: ignore[no-any-return]


def members(mask: Tensor, item: int) -> list[int]:
    return [place for place, real in enumerate(mask[item].tolist()) if real]


def plain_best(scores: Tensor, mask: Tensor) -> Tensor:
    """Highest score, then lowest place."""
    return torch.tensor([max(members(mask, i), key=lambda p: (float(scores[i, p]), -p)) for i in range(len(mask))])


def plain_chosen(order: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    """Walk along the order."""
    kept = torch.zeros_like(mask)
    for item, count in enumerate(keep.tolist()):
        for place in order[item, :count].tolist():
            kept[item, place] = bool(mask[item, place])
    return kept


def plain_total(features: Tensor, weights: Tensor) -> Tensor:
    """Token by token."""
    columns = zip(features, weights.double(), strict=True)
    return torch.stack([sum(w * x.double() for w, x in zip(row, item, strict=True)) for item, row in columns])


def plain_alignment(features: Tensor, direction: Tensor) -> Tensor:
    """<x / |x|, d>, token by token."""
    rows = [
        [float((x.double() / x.double().norm()) @ d.double()) for x in item]
        for item, d in zip(features, direction, strict=True)
    ]
    return torch.tensor(rows)


def plain_alignments(features: Tensor, directions: Tensor) -> Tensor:
    """Direction by direction."""
    return torch.stack([plain_alignment(features, each) for each in directions.unbind(1)], 1)


def plain_products(rows: Tensor, direction: Tensor) -> Tensor:
    """<x, d>, row by row."""
    return torch.tensor(
        [[float(x.double() @ d.double()) for x in item] for item, d in zip(rows, direction, strict=True)]
    )


def plain_cosine_to_mean(features: Tensor, mask: Tensor) -> Tensor:
    """cos(x_v, mean of x), token by token; also for those that are masked, which do not enter the mean."""
    rows = []
    for item in range(len(mask)):
        mean = torch.stack([features[item, p].double() for p in members(mask, item)]).mean(0)
        rows.append([float(x.double() @ mean / (x.double().norm() * mean.norm())) for x in features[item]])
    return torch.tensor(rows)


def walk(features: Tensor, start: Tensor, steps: int, mask: Tensor, over: Callable[[list[float]], float]) -> Tensor:
    """The lowest `over` of the cosines to all chosen tokens, then the lowest place, step by step."""
    orders = []
    for item in range(len(mask)):
        like, free = cosines(features[item]), members(mask, item)
        order = [int(start[item])]
        free.remove(order[0])
        while free and len(order) < steps:
            order.append(min(free, key=lambda v: (over([like[v][c] for c in order]), v)))
            free.remove(order[-1])
        orders.append(order + [0] * (steps - len(order)))
    return torch.tensor(orders)


def plain_max_sum(features: Tensor, start: Tensor, steps: int, mask: Tensor) -> Tensor:
    return walk(features, start, steps, mask, sum)


def plain_k_center(features: Tensor, start: Tensor, steps: int, mask: Tensor) -> Tensor:
    return walk(features, start, steps, mask, max)


def plain_most_isolated(features: Tensor, mask: Tensor) -> Tensor:
    """Largest distance to the nearest other token, then lowest place."""
    places = []
    for item in range(len(mask)):
        like, free = cosines(features[item]), members(mask, item)
        nearest = {v: max((round(like[v][c], 9) for c in free if c != v), default=0.0) for v in free}
        places.append(min(free, key=lambda v: (nearest[v], v)))
    return torch.tensor(places)


def plain_greedy_map(features: Tensor, quality: Tensor, steps: int, mask: Tensor) -> Tensor:
    """The highest determinant of the enlarged kernel; where every one is zero, the highest quality."""
    orders = []
    for item in range(len(mask)):
        like, free = torch.tensor(cosines(features[item])).double(), members(mask, item)
        q = quality[item].double()
        order: list[int] = []
        while free and len(order) < steps:
            base = float(like[order][:, order].det()) if order else 1.0
            ratio = {v: float(like[[*order, v]][:, [*order, v]].det()) / base for v in free}
            new = [v for v in free if ratio[v] > 1e-5 and base > 1e-200]
            pick = max(new, key=lambda v: (float(q[v]) ** 2 * ratio[v], -v)) if new else None
            order.append(pick if pick is not None else max(free, key=lambda v: (float(q[v]), -v)))
            free.remove(order[-1])
            if pick is None:  # spanned: from here on by quality alone
                order += sorted(free, key=lambda v: (-float(q[v]), v))
                free = []
        orders.append((order + [0] * steps)[:steps])
    return torch.tensor(orders)


def plain_in_groups(group: Tensor, groups: int, width: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Collect the members of every group."""
    place = torch.zeros(len(group), groups, width, dtype=torch.long)
    real = torch.zeros(len(group), groups, width, dtype=torch.bool)
    for item in range(len(group)):
        for g in range(groups):
            own = [p for p in members(mask, item) if group[item, p] == g]
            place[item, g, : len(own)] = torch.tensor(own, dtype=torch.long)
            real[item, g, : len(own)] = True
    return place, real


def scene(items: int, length: int, width: int, seed: int = 0) -> dict[str, Any]:
    """features and mask of items of different length, tokens missing in between."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(items, length, generator=generator) > 0.1
    mask[0, 30:] = False
    mask[:, 2] = True
    return {"features": torch.randn(items, length, width, generator=generator) + 0.3, "mask": mask}


def make_scores(size: Size) -> dict[str, Any]:
    given = scene(3, 37, 1) if size == "small" else scene(64, 2880, 1)
    return {"scores": given["features"][..., 0].mul(2).round(), "mask": given["mask"]}  # ties


def make_chosen(size: Size) -> dict[str, Any]:
    mask = make_scores(size)["mask"]
    order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
    return {"order": order[:, : mask.shape[1] // 2], "keep": torch.arange(len(mask)) * 5 + 1, "mask": mask}


def make_tokens(size: Size) -> dict[str, Any]:
    return scene(3, 37, 9) if size == "small" else scene(4, 576, 1024)


def make_alignment(size: Size) -> dict[str, Any]:
    features = make_tokens(size)["features"]
    return {"features": features, "direction": features[:, 1] / 2}


def make_alignments(size: Size) -> dict[str, Any]:
    features = make_tokens(size)["features"]
    return {"features": features, "directions": features[:, :5] / 2}


def make_total(size: Size) -> dict[str, Any]:
    given = make_tokens(size)
    weights = torch.rand(given["mask"].shape, generator=torch.Generator().manual_seed(2)) * given["mask"]
    return {"features": given["features"], "weights": weights}


def make_products(size: Size) -> dict[str, Any]:
    given = make_alignment(size)
    return {"rows": given["features"], "direction": given["direction"]}


def make_walk(size: Size) -> dict[str, Any]:
    given = make_tokens(size)
    steps = 11 if size == "small" else 96
    return {**given, "start": torch.full((len(given["mask"]),), 2), "steps": steps}


def make_map(size: Size) -> dict[str, Any]:
    """More steps than the rank in the small case, so that the choice by quality shows too."""
    given = scene(3, 37, 9) if size == "small" else scene(4, 144, 64)
    quality = torch.rand(given["mask"].shape, generator=torch.Generator().manual_seed(2))
    return {**given, "quality": quality, "steps": 15 if size == "small" else 25}


def make_groups(size: Size) -> dict[str, Any]:
    mask = make_scores(size)["mask"]
    group = torch.randint(4, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"group": group, "groups": 5, "width": mask.shape[1], "mask": mask}


CASES = (
    OpCase(best, plain_best, make_scores),
    OpCase(chosen, plain_chosen, make_chosen),
    OpCase(total, plain_total, make_total, tolerance=1e-6),
    OpCase(alignment, plain_alignment, make_alignment, tolerance=1e-6),
    OpCase(alignments, plain_alignments, make_alignments, tolerance=1e-6),
    OpCase(products, plain_products, make_products, tolerance=1e-4),
    OpCase(cosine_to_mean, plain_cosine_to_mean, make_tokens, tolerance=1e-6),
    OpCase(max_sum, plain_max_sum, make_walk),
    OpCase(k_center, plain_k_center, make_walk),
    OpCase(most_isolated, plain_most_isolated, make_tokens),
    OpCase(greedy_map, plain_greedy_map, make_map),
    OpCase(in_groups, plain_in_groups, make_groups),
)
