"""SCOPE, VisPruner, HoloV, PruMerge: attention of the encoder and features; the last returns rows [I, K, D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtc.testing.released import Scene
from vtc.testing.released.ranking import best, each, tiles

unit = torch.nn.functional.normalize


def _like(rows: Tensor) -> Tensor:
    """[..., N, N] cosines."""
    rows = unit(rows, dim=-1)
    return rows @ rows.transpose(-1, -2)


def _split(scene: Scene) -> tuple[Tensor, ...]:
    """The recorded values of all crops, one behind the other."""
    return tuple(tiles(scene, values).flatten(0, 1) for values in scene.values)


# --- SCOPE
def _covering(score: Tensor, features: Tensor, count: int, alpha: float) -> Tensor:
    """Marks [G, n]: always what covers most of what no chosen one covers."""
    like, group = _like(features), torch.arange(len(features))
    covered = torch.zeros_like(score)
    marks = torch.zeros_like(score, dtype=torch.bool)
    for _ in range(count):
        gain = (like - covered[:, :, None]).clamp(min=0).sum(1) * score**alpha
        token = gain.masked_fill(marks, -torch.inf).argmax(1)
        marks[group, token] = True
        covered = torch.maximum(covered, like[group, token])
    return marks


def scope_batched(scene: Scene) -> Tensor:
    """All crops at once."""
    score, features = _split(scene)
    marks = _covering(score, features, scene.keep // scene.shape[0], scene.method.alpha)
    return marks.view(scene.items, -1)


def scope_loop(scene: Scene) -> Tensor:
    """Crop after crop."""
    columns, count = zip(*_split(scene), strict=True), scene.keep // scene.shape[0]
    marks = [_covering(score[None], rows[None], count, scene.method.alpha) for score, rows in columns]
    return torch.cat(marks).view(scene.items, -1)


# --- VisPruner
def _thinned(features: Tensor, listed: Tensor, count: int) -> Tensor:
    """Places [G, count] that are left of lists [G, M]: in each round eight duplicates leave."""
    while (length := listed.shape[1]) > count:
        gone = min(8, length - count)
        first, second = listed[:, ::2], listed[:, 1::2]
        rows = [unit(features.gather(1, part[..., None].expand(-1, -1, features.shape[2])), dim=2)
                for part in (first, second)]  # fmt: skip
        falling = (rows[0] @ rows[1].transpose(1, 2)).amax(2).argsort(dim=1, descending=True, stable=True)
        listed = torch.cat([first.gather(1, falling[:, gone:]), second], 1)
    return listed


def _varied(scene: Scene, score: Tensor, features: Tensor) -> Tensor:
    """Marks [G, n]."""
    share = scene.keep // scene.shape[0]
    important = int(share * scene.method.share)
    order = score.argsort(dim=1, descending=True, stable=True)
    kept = torch.cat([order[:, :important], _thinned(features, order[:, important:], share - important)], 1)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, kept, True)


def vispruner_batched(scene: Scene) -> Tensor:
    """The important tokens, and of the others those that are no duplicates."""
    score, features = _split(scene)
    return _varied(scene, score, features).view(scene.items, -1)


def vispruner_loop(scene: Scene) -> Tensor:
    marks = [_varied(scene, score[None], rows[None]) for score, rows in zip(*_split(scene), strict=True)]
    return torch.cat(marks).view(scene.items, -1)


# --- HoloV
def holov_batched(scene: Scene) -> Tensor:
    """Runs of raster rows share the tokens by attention and variation, and keep their most attended."""
    received = scene.values[0].view(scene.items, scene.method.runs, -1)
    like = _like(scene.tokens.view(*received.shape, -1))
    like.diagonal(dim1=2, dim2=3).zero_()
    others = received.shape[2] - 1
    mean = like.sum(3) / others
    varied = (like - mean[..., None]).square().sum(3) / others
    paid = 1000 * received
    scale = paid.abs().mean(2, keepdim=True) / (varied.abs().mean(2, keepdim=True) + 1e-6)
    weight = (paid + 0.09 * varied * scale).mean(2)
    weight = weight / weight.sum(1, keepdim=True)
    quota = (weight * scene.keep).floor()
    rest = weight.argsort(1, descending=True).argsort(1)
    quota += rest < scene.keep - quota.sum(1, keepdim=True)
    rank = received.argsort(dim=2, descending=True, stable=True).argsort(2)
    return (rank < quota[..., None]).flatten(1)


def holov_loop(scene: Scene) -> Tensor:
    marks, runs = [], scene.method.runs
    size = scene.length // runs
    for item, tokens in enumerate(scene.tokens):
        received, weights = scene.item(item)[0].view(runs, -1), []
        for run in range(runs):
            like = _like(tokens[run * size : (run + 1) * size])
            like.fill_diagonal_(0)
            mean = like.sum(1) / (size - 1)
            varied = (like - mean[:, None]).square().sum(1) / (size - 1)
            paid = 1000 * received[run]
            weights.append((paid + 0.09 * varied * paid.abs().mean() / (varied.abs().mean() + 1e-6)).mean().item())
        quota = [math.floor(scene.keep * weight / sum(weights)) for weight in weights]
        for run in sorted(range(runs), key=lambda run: -weights[run])[: scene.keep - sum(quota)]:
            quota[run] += 1
        places = [run * size + received[run].topk(k).indices.sort().values for run, k in enumerate(quota)]
        marks.append(torch.cat(places))
    return each(scene, marks)


# --- PruMerge
def prumerge(scene: Scene, tokens: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """The most attended tokens, others evenly between, each with its neighbours added; the rest is one more token."""
    items, crops, _, width = tokens.shape
    x, score, keys = tokens.flatten(0, 1), attention.flatten(0, 1), keys.flatten(0, 1)
    share = scene.keep // crops - 1
    first = math.floor(share * scene.method.share + 0.5)
    kept = best(score, first)
    if share > first:
        left = (~kept).nonzero()[:, 1].view(len(x), -1)
        steps = 2 * torch.arange(share - first) + 1
        spread = -(-steps * left.shape[1] // (2 * (share - first))) - 1
        kept = kept.scatter(1, left[:, spread], True)
    like = _like(keys)
    like.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    near = like[kept].topk(scene.method.neighbours, 1).indices.view(len(x), share, -1)
    group = torch.arange(len(x))[:, None, None]
    added = (score[group, near][..., None] * x[group, near]).sum(2)
    merged = x[kept].view(len(x), share, width) + added
    rest = torch.einsum("gn,gnd->gd", score * ~kept, x)
    places = torch.cat([kept.nonzero()[:, 1].view(len(x), -1), (~kept).nonzero()[:, 1].view(len(x), -1)[:, -1:]], 1)
    rows = torch.cat([merged, rest[:, None]], 1)
    return rows.gather(1, places.argsort(1)[..., None].expand_as(rows)).view(items, -1, width)
