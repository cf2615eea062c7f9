"""Cosine k-means over the tokens of an item: several runs at once, any number of clusters, nothing of size N x N.

I items, N tokens, D their width, R runs per item (other seeds or other numbers of clusters), K the most clusters of a
run. Tokens enter in any precision and length; u is a token scaled to length one. Distances are streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vtc.ops.checks import numbers
from vtc.ops.hashing import fingerprint, uniform
from vtc.ops.rank import inverse, order_by
from vtc.ops.select import first_best, take_rows

_LIMIT = 2**24  # numbers in one block of a streamed pass
_EPSILON = 1e-12
_TIE = 1e-6  # cosines closer than this count as equal
ClusterOrder = Literal["first", "cluster_id", "size"]


class Clusters(NamedTuple):
    """labels: [I, R, N], 0 on padding. centres: [I, R, K, D]. converged: [I, R] bool."""

    labels: Tensor
    centres: Tensor
    converged: Tensor


class Members(NamedTuple):
    """sizes: [I, K] members of each cluster. first: [I, K] the lowest of them, -1 in an empty cluster."""

    sizes: Tensor
    first: Tensor


def seed_centres(
    tokens: Tensor, counts: Tensor, width: int, key: Tensor, token: Tensor, mask: Tensor, *, seed: int = 0
) -> Tensor:
    """k-means++: draw starting tokens, each with probability d^2 + 1e-6, d its distance to those drawn before.

    tokens: [I, N, D]. counts: [I, R] clusters of each run, at most `width`. key: [I] int64 and token: [I, N] decide the
    draws together with `seed`, whatever else is in the batch. mask: [I, N]. Returns [I, R, width] token indices;
    those behind a run's count are repetitions.
    """
    scale, runs = _scale(tokens, mask), counts.shape[1]
    squares = (_squares(tokens) * scale.square())[:, None]
    nearest = torch.full((len(tokens), runs, tokens.shape[1]), torch.inf, device=tokens.device)
    drawn: list[Tensor] = []
    for waiting in _waiting(key, token, mask, runs, width, seed):
        # Of exponential waiting times with these rates the shortest belongs to i with probability rate_i / sum.
        drawn.append((waiting / (nearest + 1e-6) if drawn else waiting).argmin(-1))  # [I, R]
        picked = take_rows(tokens, drawn[-1]).float() * scale.gather(1, drawn[-1])[..., None]
        inner = _project(tokens, picked) * scale[..., None]  # [I, N, R]
        distance = squares + picked.square().sum(-1)[..., None] - 2 * inner.transpose(1, 2)
        nearest = torch.minimum(nearest, torch.where(distance > _TIE, distance, 0))  # rounding is no distance
    steps = torch.arange(width, device=tokens.device)
    found = torch.stack(drawn, -1)
    return torch.where(steps < counts[..., None], found, found[..., :1])


def _waiting(key: Tensor, token: Tensor, mask: Tensor, runs: int, steps: int, seed: int) -> Iterator[Tensor]:
    """[I, R, N] exponential waiting times of rate 1 for each step, infinite on padding; drawn for many at once."""
    items, places = token.shape
    step = torch.arange(steps, device=key.device)
    number = torch.arange(runs, device=key.device)[:, None]
    each = [part.expand(items, runs, steps) for part in (key[:, None, None], number, step)]
    keys = fingerprint(torch.stack(each, -1).flatten(0, 2)).view(items, runs, steps)
    for some in torch.split(keys, max(1, _LIMIT // max(1, items * runs * places)), dim=2):
        tokens = token[:, None, None].expand(*some.shape, places)
        chance = uniform(some.flatten(), tokens.flatten(0, 2), seed).view(tokens.shape)
        waiting = -torch.log1p(-(chance * (1 - 2**-24) + 2**-25))
        yield from waiting.masked_fill(~mask[:, None, None], torch.inf).unbind(2)


def kmeans(
    tokens: Tensor, start: Tensor, counts: Tensor, mask: Tensor, *, iterations: int = 50, tolerance: float = 1e-4
) -> Clusters:
    """Cosine k-means with arithmetic means of the scaled members as centres, not scaled again.

    tokens: [I, N, D]. start: [I, R, K] token indices of the first centres. counts: [I, R] clusters of each run; what
    lies behind takes no part. mask: [I, N]. A run whose centres move by less than `tolerance` (all together) keeps the
    centres its labels were computed from; one that never does ends with centres one update newer. A cluster without
    members keeps its centre; equal distances go to the lower cluster.
    """
    tokens = numbers(tokens, mask)
    scale = _scale(tokens, mask)
    flat = start.flatten(1)
    centres = (take_rows(tokens, flat).float() * scale.gather(1, flat)[..., None]).view(*start.shape, -1)
    live = torch.arange(start.shape[2], device=start.device) < counts[..., None]
    converged = torch.zeros_like(counts, dtype=torch.bool)
    labels = torch.zeros((*counts.shape, tokens.shape[1]), dtype=torch.long, device=tokens.device)
    for _ in range(iterations):
        labels = nearest_centre(tokens, centres, live).masked_fill(~mask[:, None], 0)
        sums, sizes = _sums(tokens, labels, scale, mask, start.shape[2])
        updated = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centres)
        moved = (updated - centres).square().sum((-1, -2)).sqrt()
        converged = converged | (moved < tolerance)
        centres = torch.where(converged[..., None, None], centres, updated)
        # Runs that converged stay as they are, so stopping changes nothing; asking costs nothing on the CPU alone.
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool(converged.all()):
            break
    return Clusters(labels, centres, converged)


def nearest_centre(tokens: Tensor, centres: Tensor, live: Tensor) -> Tensor:
    """[I, R, N] the centre of each run with the smallest cosine distance, the lower one among equals.

    centres: [I, R, K, D]. live: [I, R, K] bool, the centres that may be chosen.
    """
    direction = centres / centres.norm(dim=-1, keepdim=True).clamp(min=_EPSILON)
    flat, blocked = direction.flatten(1, 2).transpose(1, 2), ~live[:, None]

    def choose(block: Tensor) -> Tensor:
        block = block / block.norm(dim=-1, keepdim=True).clamp(min=_EPSILON)
        inner = torch.bmm(block, flat).view(*block.shape[:2], *live.shape[1:])
        return first_best(inner.masked_fill(blocked, -torch.inf), _TIE)

    return _stream(choose, tokens, live[0].numel()).transpose(1, 2)


def distortion(tokens: Tensor, clusters: Clusters, mask: Tensor) -> Tensor:
    """[I, R] sum over the tokens of the squared distance between u and the centre it is labelled with."""
    scale = _scale(tokens, mask)
    width = clusters.centres.shape[2]
    norms = clusters.centres.square().sum(-1)
    inner = _project_own(tokens, clusters.labels, clusters.centres.flatten(1, 2), width) * scale[:, None]
    squares = (_squares(tokens) * scale.square())[:, None]
    each = squares - 2 * inner + norms.gather(2, clusters.labels)
    return each.masked_fill(~mask[:, None], 0).sum(-1)


def elbow(distortions: Tensor, least: int, *, rule: Literal["official", "corrected"] = "official") -> Tensor:
    """The number of clusters at the sharpest kink of the distortions.

    distortions: [I, R] of least, least + 1, ... clusters. The kink is the first largest second difference, at list
    position j counted from 0. "official": max(least, j + 4), as the released code has it; "corrected": the number in
    the middle of the kink, least + 1 + j. Returns [I].

    >>> elbow(torch.tensor([[9.0, 8.0, 7.0, 2.0, 1.0]]), 12, rule="corrected").tolist()
    [15]
    """
    kink = distortions.diff(dim=1).diff(dim=1).argmax(1)
    return (kink + 4).clamp(min=least) if rule == "official" else kink + least + 1


def split_empty(tokens: Tensor, labels: Tensor, counts: Tensor, width: int, mask: Tensor) -> Tensor:
    """Fill empty clusters with the tokens that fit their own cluster worst, so that every cluster has a member.

    labels: [I, N] below counts: [I], at most `width`. The token closest in cosine to its cluster's mean stays where it
    is, the others are taken from the farthest on (the lower among equals), one for each empty cluster in turn. Clusters
    beyond the number of tokens stay empty. Returns labels [I, N].
    """
    means, _ = codebook(tokens, labels, width, mask, normalized=True)
    members = describe(labels, width, mask)
    likeness = _likeness(tokens, labels, means, mask)
    best = marked(_medoids(likeness, labels, members, mask), mask.shape[1])
    steps = torch.arange(width, device=labels.device)
    empty = (members.sizes == 0) & (steps < counts[:, None])
    vacant = order_by(~empty)  # [I, K] empty clusters first, ascending
    free = (likeness / _TIE).round().masked_fill(best | ~mask, torch.inf)
    order = free.argsort(dim=1, stable=True)[:, : min(width, labels.shape[1])]
    steps = steps[: order.shape[1]]
    moves = (steps < empty.sum(1, keepdim=True)) & free.gather(1, order).isfinite()
    target = torch.where(moves, vacant[:, : order.shape[1]], labels.gather(1, order))
    return labels.scatter(1, order, target)


def codebook(tokens: Tensor, labels: Tensor, width: int, mask: Tensor, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """Mean of every cluster's tokens, of u if `normalized`; zero where a cluster is empty. Differentiable in tokens.

    labels: [I, N] below width. Returns float32 [I, width, D] and the sizes [I, width].
    """
    scale = _scale(tokens, mask) if normalized else mask.float()
    sums, sizes = _sums(tokens, labels[:, None], scale, mask, width)
    return (sums / sizes.clamp(min=1)[..., None])[:, 0], sizes[:, 0].long()


def describe(labels: Tensor, width: int, mask: Tensor) -> Members:
    """Sizes and first members of `width` clusters; labels: [I, N]."""
    where = torch.where(mask, labels, width)
    zeros = torch.zeros(len(labels), width + 1, dtype=torch.long, device=labels.device)
    place = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = (zeros + labels.shape[1]).scatter_reduce(1, where, place, "amin")[:, :width]
    sizes = zeros.scatter_add(1, where, torch.ones_like(where))[:, :width]
    return Members(sizes, torch.where(sizes > 0, first, -1))


def medoids(tokens: Tensor, labels: Tensor, width: int, mask: Tensor) -> Tensor:
    """[I, width] the member with the largest cosine to the mean of the members' u, lowest among equals, -1 if empty."""
    means, _ = codebook(tokens, labels, width, mask, normalized=True)
    likeness = _likeness(tokens, labels, means, mask)
    return _medoids(likeness, labels, describe(labels, width, mask), mask)


def ordering(members: Members, order: ClusterOrder = "first") -> Tensor:
    """[I, K] the clusters in output order, empty ones last.

    "first": by first member; "cluster_id": as numbered; "size": larger ones first, then by first member.

    >>> ordering(Members(torch.tensor([[2, 0, 5, 2]]), torch.tensor([[4, -1, 7, 0]])), "size").tolist()
    [[2, 3, 0, 1]]
    """
    empty = members.sizes == 0
    if order == "cluster_id":
        return order_by(empty)
    first = torch.where(empty, torch.iinfo(torch.long).max, members.first)
    return order_by(first) if order == "first" else order_by(-members.sizes, first)


def relabel(labels: Tensor, order: Tensor) -> Tensor:
    """Number the clusters by their rank: order [I, K] as from `ordering`, labels [I, N] -> [I, N]."""
    return inverse(order).gather(1, labels)


def marked(places: Tensor, length: int) -> Tensor:
    """[I, length] bool, True at `places` [I, K]; negative ones mark nothing."""
    found = torch.zeros(len(places), length + 1, dtype=torch.bool, device=places.device)
    return found.scatter(1, torch.where(places < 0, length, places), True)[:, :-1]


# --- streamed passes
def _blocks(tokens: Tensor, columns: int) -> list[slice]:
    """Ranges of tokens so short that [I, n, columns] and [I, n, D] numbers fit a block."""
    items, places, width = tokens.shape
    size = max(1, _LIMIT // max(1, items * max(columns, width)))
    return [slice(at, at + size) for at in range(0, max(1, places), size)]


def _stream(function: Callable[[Tensor], Tensor], tokens: Tensor, columns: int = 1) -> Tensor:
    """Apply `function` to blocks [I, n, D] of float32 tokens; its results [I, n, ...] side by side."""
    return torch.cat([function(tokens[:, part].float()) for part in _blocks(tokens, columns)], dim=1)


def _squares(tokens: Tensor) -> Tensor:
    return _stream(lambda block: block.square().sum(-1), tokens)


def _scale(tokens: Tensor, mask: Tensor) -> Tensor:
    """[I, N] factor that brings a token to length one; 0 on padding."""
    return torch.where(mask, 1 / _stream(lambda block: block.norm(dim=-1), tokens).clamp(min=_EPSILON), 0)


def _project(tokens: Tensor, vectors: Tensor) -> Tensor:
    """[I, N, K] inner products of the tokens with `vectors` [I, K, D]."""
    return _stream(lambda block: torch.bmm(block, vectors.transpose(1, 2)), tokens, vectors.shape[1])


def _project_own(tokens: Tensor, labels: Tensor, vectors: Tensor, width: int) -> Tensor:
    """[I, R, N] product of each token with the vector of its label; labels [I, R, N], vectors [I, R * width, D]."""
    column = (labels + torch.arange(labels.shape[1], device=labels.device)[:, None] * width).transpose(1, 2)
    parts = []
    for part in _blocks(tokens, vectors.shape[1]):
        inner = torch.bmm(tokens[:, part].float(), vectors.transpose(1, 2))
        parts.append(inner.gather(2, column[:, part]))
    return torch.cat(parts, dim=1).transpose(1, 2)


def _sums(tokens: Tensor, labels: Tensor, scale: Tensor, mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scaled sums [I, R, width, D] and sizes [I, R, width] of the clusters of every run; labels [I, R, N]."""
    items, runs, _ = labels.shape
    clusters = torch.arange(width, device=labels.device)[:, None]
    sums = torch.zeros(items, runs * width, tokens.shape[2], device=tokens.device)
    sizes = torch.zeros(items, runs, width, device=tokens.device)
    for part in _blocks(tokens, runs * width):
        chosen = ((labels[:, :, None, part] == clusters) & mask[:, None, None, part]).float()
        sizes = sizes + chosen.sum(-1)
        weights = (chosen * scale[:, None, None, part]).flatten(1, 2)
        sums = sums + torch.bmm(weights, tokens[:, part].float())
    return sums.view(*sizes.shape, -1), sizes


def _likeness(tokens: Tensor, labels: Tensor, means: Tensor, mask: Tensor) -> Tensor:
    """[I, N] cosine of each token to the mean of its cluster."""
    direction = means / means.norm(dim=-1, keepdim=True).clamp(min=_EPSILON)
    return _project_own(tokens, labels[:, None], direction, means.shape[1])[:, 0] * _scale(tokens, mask)


def _medoids(likeness: Tensor, labels: Tensor, members: Members, mask: Tensor) -> Tensor:
    width = members.sizes.shape[1]
    where = torch.where(mask, labels, width)
    lowest = torch.full((len(labels), width + 1), -torch.inf, device=labels.device)
    best = lowest.scatter_reduce(1, where, likeness, "amax")
    place = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    # The two members of a pair are equally close to their mean; rounding must not choose between them.
    place = torch.where(likeness > best.gather(1, where) - _TIE, place, labels.shape[1])
    first = torch.full_like(lowest, labels.shape[1], dtype=torch.long).scatter_reduce(1, where, place, "amin")
    return torch.where(members.sizes > 0, first[:, :width], -1)
