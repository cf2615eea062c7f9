"""Methods inside the encoder, at the first of their stages, on crops of one raster; [I, K, D] rows, or marks."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.methods.zero_tprune import GRAPH
from vtc.ops.grid import output_grid
from vtc.testing.released import Scene
from vtc.testing.released.merging import pick, unit
from vtc.testing.released.ranking import best


def diffrate(scene: Scene, tokens: Tensor, score: Tensor) -> Tensor:
    """In the order of importance the last are pruned, and the ones before them join the nearest of the first."""
    x, left = tokens[:, 0], scene.keep
    gone = x.shape[1] - left
    order = score[:, 0].argsort(dim=1, descending=True)[:, : left + int(gone * (1 - scene.method.share))]
    first, tail = order[:, :left].sort(1).values, order[:, left:]
    goal, source = pick(x, first), pick(x, tail)
    cosine, into = (unit(source, dim=-1) @ unit(goal, dim=-1).transpose(1, 2)).max(2)
    torch.ones(into.shape[0], left).scatter_add(1, into, cosine)  # what keys count for in later blocks
    return goal.scatter_reduce(1, into[..., None].expand_as(source), source, "mean")


def token_transforming(scene: Scene, tokens: Tensor, score: Tensor) -> Tensor:
    """Every row is a mean of all, weighted by their likeness to one of the most attended ones."""
    x = tokens[:, 0]
    direction = unit(x, dim=-1)
    anchors = score[:, 0].topk(scene.keep, 1).indices.sort(1).values
    alike = pick(direction, anchors) @ direction.transpose(1, 2)
    weight: Tensor = (alike / scene.method.tau).softmax(-1)
    return weight @ x


def expediting_vit(scene: Scene, tokens: Tensor) -> Tensor:
    """Soft k-means among the clusters in a window around a patch's own, from the means of cells."""
    x, method, grid = tokens[:, 0], scene.method, scene.shape[1:]
    small = output_grid(*grid, scene.keep)
    maps = x.transpose(1, 2).view(len(x), -1, *grid)
    centres = torch.nn.functional.adaptive_avg_pool2d(maps, small).flatten(2).transpose(1, 2)
    own = [torch.arange(length) * cells // length for length, cells in zip(grid, small, strict=True)]
    rows, columns = (
        (place[:, None] - torch.arange(cells)).abs() <= method.window // 2
        for place, cells in zip(own, small, strict=True)
    )
    near = (rows[:, None, :, None] & columns[None, :, None, :]).view(x.shape[1], -1)
    for _ in range(method.iterations):
        share = (-method.temperature * torch.cdist(x, centres).square()).masked_fill(~near, -torch.inf).softmax(-1)
        centres = share.transpose(1, 2) @ x / share.sum(1)[..., None]
    return centres


def pixelprune(scene: Scene, _: Tensor, pixels: Tensor) -> Tensor:
    """The patches that differ most from the neighbour they are predicted by: the left one, or the one above."""
    cells = pixels[:, 0].reshape(len(pixels), *scene.shape[1:], -1)
    left = torch.full(cells.shape[:3], torch.inf)
    above = left.clone()
    left[:, :, 1:] = (cells[:, :, 1:] - cells[:, :, :-1]).abs().amax(-1)
    above[:, 1:] = (cells[:, 1:] - cells[:, :-1]).abs().amax(-1)
    down = torch.zeros(cells.shape[:3], dtype=torch.bool)
    down[:, 1:, 1:] = (above[:, 1:, :-1] == 0) & (left[:, :-1, 1:] != 0)
    down[:, 1:, 0] = True
    return best(torch.where(down, above, left).flatten(1), scene.keep)


def zero_tprune(scene: Scene, _: Tensor, graph: Tensor) -> Tensor:
    """Page rank; what is most like the important half leaves; page rank of the rest, the least important leave."""
    method, view, graph = scene.method, scene.view, graph[:, 0]
    lead = view.vision_lead(method.stages_of(view.model)[0] - 1, GRAPH)[: len(graph)]  # the same for all
    query, key = torch.cat([lead, graph], 1).permute(2, 0, 3, 1, 4)
    turns, front, gone = method.iterations[0], lead.shape[1], graph.shape[1] - scene.keep
    attention = (query @ key.transpose(2, 3)).softmax(-1)
    similar = min(method.similar, gone // 2)
    score = _importance(_rank(attention, front, turns), method.variance)
    important = best(score, (graph.shape[1] + 1) // 2)
    direction = unit(graph[:, :, 1].mean(2), dim=-1)
    alike = (direction @ direction.transpose(1, 2)).masked_fill(~important[:, None], -torch.inf).amax(2)
    drop = best(alike.masked_fill(important, -torch.inf), similar)
    stays = (~drop).nonzero()[:, 1].view(len(graph), -1)
    index = torch.cat([torch.arange(front).expand(len(graph), -1), stays + front], 1)[:, None, :, None]
    wide = (-1, query.shape[1], -1, query.shape[3])
    query, key = query.gather(2, index.expand(wide)), key.gather(2, index.expand(wide))
    score = _importance(_rank((query @ key.transpose(2, 3)).softmax(-1), front, turns), method.variance)
    return torch.zeros_like(drop).scatter(1, stays, best(score, scene.keep))


def _rank(attention: Tensor, front: int, turns: int) -> Tensor:
    """[I, H, n] page rank of the patches behind `front` rows, the first of them the class token's; of [I, H, T, T]."""
    mass = torch.full(attention.shape[:2] + attention.shape[3:], 1 / attention.shape[3])
    mass[..., 0] *= attention.shape[3] ** 0.5
    for _ in range(turns):
        mass = (mass[:, :, None] @ attention)[:, :, 0]
    return mass[..., front:] * attention.shape[3]


def _importance(mass: Tensor, variance: tuple[float, float]) -> Tensor:
    """[I, n] root mean square over the heads [I, H, n] that vary neither too little nor too much."""
    spread = mass.var(2, unbiased=False, keepdim=True)
    within = (spread >= variance[0]) & (spread <= variance[1])
    within = within | ~within.any(1, keepdim=True)
    return ((mass.square() * within).sum(1) / within.sum(1)).sqrt()
