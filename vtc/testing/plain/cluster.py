"""k-means one item, one run, one token at a time, in double precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtc.methods.vqtoken import cluster
from vtc.methods.vqtoken.cluster import Clusters, Members
from vtc.ops.hashing import fingerprint, uniform
from vtc.testing.plain import OpCase, Size

Vector = list[float]


def units(tokens: Tensor) -> list[Vector]:
    """Every token over its length, at least 1e-12."""
    return [[v / max(math.hypot(*row), 1e-12) for v in row] for row in tokens.double().tolist()]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def mean(rows: list[Vector]) -> Vector:
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def valid(mask: Tensor) -> list[int]:
    """How many tokens each item has."""
    return [int(row.sum()) for row in mask]


def closest(u: Vector, centres: list[Vector]) -> int:
    """The centre with the smallest cosine distance, the lower among equals."""
    distances = [1 - dot(u, c) / max(math.hypot(*c), 1e-12) for c in centres]
    return distances.index(min(distances))


def seed_centres(
    tokens: Tensor, counts: Tensor, width: int, key: Tensor, token: Tensor, mask: Tensor, *, seed: int = 0
) -> Tensor:
    found = torch.zeros(*counts.shape, width, dtype=torch.long)
    for i, n in enumerate(valid(mask)):
        u = units(tokens[i, :n])
        for r, count in enumerate(counts[i].tolist()):
            chosen: list[int] = []
            for step in range(count):
                draw = uniform(fingerprint(torch.tensor([[int(key[i]), r, step]])), token[i : i + 1, :n], seed)[0]
                chance = [c * (1 - 2**-24) + 2**-25 for c in draw.double().tolist()]
                rate = [1.0] * n
                if chosen:
                    rate = [min(math.dist(x, u[c]) ** 2 for c in chosen) + 1e-6 for x in u]
                waiting = [-math.log1p(-c) / w for c, w in zip(chance, rate, strict=True)]
                chosen.append(waiting.index(min(waiting)))
            found[i, r] = torch.tensor(chosen + [chosen[0]] * (width - count))
    return found


def kmeans(
    tokens: Tensor, start: Tensor, counts: Tensor, mask: Tensor, *, iterations: int = 50, tolerance: float = 1e-4
) -> Clusters:
    labels = torch.zeros(*start.shape[:2], tokens.shape[1], dtype=torch.long)
    centres = torch.zeros(*start.shape, tokens.shape[2])
    converged = torch.zeros(start.shape[:2], dtype=torch.bool)
    for i, n in enumerate(valid(mask)):
        u = units(tokens[i, :n])
        for r, count in enumerate(counts[i].tolist()):
            held = [u[s] for s in start[i, r, :count].tolist()]
            label: list[int] = []
            for _ in range(iterations):
                label = [closest(x, held) for x in u]
                members = [[x for x, own in zip(u, label, strict=True) if own == k] for k in range(count)]
                moved = [mean(rows) if rows else c for rows, c in zip(members, held, strict=True)]
                if math.hypot(*(math.dist(a, b) for a, b in zip(moved, held, strict=True))) < tolerance:
                    converged[i, r] = True
                    break
                held = moved
            labels[i, r, :n] = torch.tensor(label)
            centres[i, r] = torch.tensor(held + [u[s] for s in start[i, r, count:].tolist()])
    return Clusters(labels, centres, converged)


def nearest_centre(tokens: Tensor, centres: Tensor, live: Tensor) -> Tensor:
    items, runs, width, _ = centres.shape
    found = torch.zeros(items, runs, tokens.shape[1], dtype=torch.long)
    for i in range(items):
        u = units(tokens[i])
        for r in range(runs):
            allowed = [k for k in range(width) if live[i, r, k]]
            rows = [centres[i, r, k].double().tolist() for k in allowed]
            found[i, r] = torch.tensor([allowed[closest(x, rows)] for x in u])
    return found


def distortion(tokens: Tensor, clusters: Clusters, mask: Tensor) -> Tensor:
    found = torch.zeros(clusters.labels.shape[:2])
    for i, n in enumerate(valid(mask)):
        u = units(tokens[i, :n])
        for r in range(found.shape[1]):
            centres = clusters.centres[i, r].double().tolist()
            label = clusters.labels[i, r, :n].tolist()
            found[i, r] = math.fsum(math.dist(x, centres[k]) ** 2 for x, k in zip(u, label, strict=True))
    return found


def elbow(distortions: Tensor, least: int, *, rule: str = "official") -> Tensor:
    numbers = []
    for e in distortions.double().tolist():
        second = [e[j + 2] - 2 * e[j + 1] + e[j] for j in range(len(e) - 2)]
        kink = second.index(max(second))
        numbers.append(max(least, kink + 4) if rule == "official" else least + 1 + kink)
    return torch.tensor(numbers)


def codebook(tokens: Tensor, labels: Tensor, width: int, mask: Tensor, *, normalized: bool) -> tuple[Tensor, Tensor]:
    codes, sizes = torch.zeros(len(labels), width, tokens.shape[2]), torch.zeros(len(labels), width, dtype=torch.long)
    for i, n in enumerate(valid(mask)):
        rows = units(tokens[i, :n]) if normalized else tokens[i, :n].double().tolist()
        for k in range(width):
            members = [row for row, label in zip(rows, labels[i, :n].tolist(), strict=True) if label == k]
            sizes[i, k] = len(members)
            if members:
                codes[i, k] = torch.tensor(mean(members))
    return codes, sizes


def describe(labels: Tensor, width: int, mask: Tensor) -> Members:
    rows = [row[:n].tolist() for row, n in zip(labels, valid(mask), strict=True)]
    sizes = [[row.count(k) for k in range(width)] for row in rows]
    first = [[row.index(k) if k in row else -1 for k in range(width)] for row in rows]
    return Members(torch.tensor(sizes), torch.tensor(first))


def likeness(tokens: Tensor, label: list[int]) -> list[float]:
    """Cosine of every token of one item to the mean of its cluster's scaled tokens."""
    u = units(tokens[: len(label)])
    means = {k: mean([x for x, own in zip(u, label, strict=True) if own == k]) for k in set(label)}
    return [dot(x, means[k]) / max(math.hypot(*means[k]), 1e-12) for x, k in zip(u, label, strict=True)]


def medoids(tokens: Tensor, labels: Tensor, width: int, mask: Tensor) -> Tensor:
    found = torch.full((len(labels), width), -1)
    for i, n in enumerate(valid(mask)):
        label = labels[i, :n].tolist()
        cosine = likeness(tokens[i], label)
        for k in set(label):
            own = [p for p in range(n) if label[p] == k]
            best = max(cosine[p] for p in own)
            found[i, k] = next(p for p in own if cosine[p] > best - 1e-6)
    return found


def split_empty(tokens: Tensor, labels: Tensor, counts: Tensor, width: int, mask: Tensor) -> Tensor:
    found = labels.clone()
    held = medoids(tokens, labels, width, mask)
    for i, n in enumerate(valid(mask)):
        label = labels[i, :n].tolist()
        cosine = likeness(tokens[i], label)
        free = sorted((p for p in range(n) if p not in held[i].tolist()), key=lambda p: (round(cosine[p], 6), p))
        empty = [k for k in range(int(counts[i])) if k not in label]
        for k, place in zip(empty, free, strict=False):
            found[i, place] = k
    return found


def ordering(members: Members, order: str = "first") -> Tensor:
    rows = []
    for size, first in zip(members.sizes.tolist(), members.first.tolist(), strict=True):
        if order == "cluster_id":
            keys = [(n == 0, k, 0) for k, n in enumerate(size)]
        elif order == "first":
            keys = [(n == 0, first[k], k) for k, n in enumerate(size)]
        else:
            keys = [(n == 0, -n, first[k]) for k, n in enumerate(size)]
        rows.append(sorted(range(len(size)), key=keys.__getitem__))
    return torch.tensor(rows)


def relabel(labels: Tensor, order: Tensor) -> Tensor:
    pairs = zip(labels.tolist(), order.tolist(), strict=True)
    return torch.tensor([[ranks.index(label) for label in row] for row, ranks in pairs])


def marked(places: Tensor, length: int) -> Tensor:
    return torch.tensor([[place in row for place in range(length)] for row in places.tolist()])


def _given(size: Size) -> dict[str, Any]:
    """Noisy groups, so that clusters exist; items of different length."""
    items, places, width, groups = (3, 63, 5, 6) if size == "small" else (2, 1152, 32, 24)
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(items, groups, width, generator=generator)
    which = torch.randint(groups, (items, places), generator=generator)
    noise = torch.randn(items, places, width, generator=generator)
    tokens = middles.gather(1, which[..., None].expand(-1, -1, width)) + 0.3 * noise
    lengths = torch.tensor([places - 9 * i for i in range(items)])
    mask = torch.arange(places) < lengths[:, None]
    return {"tokens": tokens, "mask": mask}


def _starts(size: Size) -> dict[str, Any]:
    given = _given(size)
    counts = torch.tensor([[4, 9, 6]] * len(given["mask"]) if size == "small" else [[24, 32]] * len(given["mask"]))
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randperm(int(given["mask"].sum(1).min()), generator=generator) for _ in range(counts.numel())]
    width = int(counts.max())
    start = torch.stack([draw[:width] for draw in draws]).view(*counts.shape, width)
    return {**given, "counts": counts, "start": start}


def _seeding(size: Size) -> dict[str, Any]:
    given = _starts(size)
    places = given["mask"].shape[1]
    key = torch.arange(len(given["mask"])) * 10**9 + 7
    token = torch.arange(places).expand(len(key), -1)
    return {k: given[k] for k in ("tokens", "counts", "mask")} | {
        "width": given["start"].shape[2],
        "key": key,
        "token": token,
        "seed": 3,
    }


def _kmeans(size: Size) -> dict[str, Any]:
    return {**_starts(size), "iterations": 20 if size == "small" else 5}


def _centres(size: Size) -> dict[str, Any]:
    given = _starts(size)
    flat = given["start"].flatten(1)[..., None].expand(-1, -1, given["tokens"].shape[2])
    centres = given["tokens"].gather(1, flat).unflatten(1, given["start"].shape[1:])
    live = torch.arange(centres.shape[2]) < given["counts"][..., None]
    return {"tokens": given["tokens"], "centres": centres, "live": live}


def _distortion(size: Size) -> dict[str, Any]:
    given = _centres(size)
    labels = cluster.nearest_centre(**given)
    clusters = Clusters(labels, given["centres"], torch.ones(labels.shape[:2], dtype=torch.bool))
    return {**_given(size), "clusters": clusters}


def _labelled(size: Size) -> dict[str, Any]:
    """One run's labels; some clusters are empty."""
    given = _given(size)
    centres = _centres(size)
    labels = cluster.nearest_centre(**centres)[:, 1]
    width = centres["centres"].shape[2] + 2
    return {**given, "labels": labels + (labels > 2), "width": width}


def _split(size: Size) -> dict[str, Any]:
    given = _labelled(size)
    return {**given, "counts": torch.full((len(given["mask"]),), given["width"])}


def _members(size: Size) -> dict[str, Any]:
    given = _labelled(size)
    del given["tokens"]
    return given


def _ranks(size: Size) -> dict[str, Any]:
    given = _members(size)
    return {"labels": given["labels"], "order": cluster.ordering(cluster.describe(**given))}


def _places(size: Size) -> dict[str, Any]:
    given = _members(size)
    return {"places": cluster.describe(**given).first, "length": given["mask"].shape[1]}


def _distortions(size: Size) -> dict[str, Any]:
    rows = 5 if size == "small" else 2000
    noise = torch.rand(rows, 21, generator=torch.Generator().manual_seed(2))
    return {"distortions": noise.sort(1, descending=True).values, "least": 12}


CASES = (
    OpCase(cluster.seed_centres, seed_centres, _seeding),
    OpCase(cluster.kmeans, kmeans, _kmeans, 1e-5),
    OpCase(cluster.nearest_centre, nearest_centre, _centres),
    OpCase(cluster.distortion, distortion, _distortion, 1e-5),
    OpCase(cluster.elbow, elbow, _distortions),
    OpCase(cluster.split_empty, split_empty, _split),
    OpCase(cluster.codebook, codebook, lambda size: {**_labelled(size), "normalized": True}, 1e-5),
    OpCase(cluster.describe, describe, _members),
    OpCase(cluster.medoids, medoids, _labelled),
    OpCase(cluster.ordering, ordering, lambda size: {"members": cluster.describe(**_members(size)), "order": "size"}),
    OpCase(cluster.relabel, relabel, _ranks),
    OpCase(cluster.marked, marked, _places),
)
