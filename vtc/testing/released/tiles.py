"""HiPrune and GlobalCom2: choices inside tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testing.released import Scene
from vtc.testing.released.ranking import best, each, tiles


def _ranks(scores: Tensor) -> Tensor:
    """Place of every entry in falling order, along the last axis."""
    order = scores.argsort(-1, descending=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1]).expand_as(order))


# --- HiPrune
def hiprune_batched(scene: Scene) -> Tensor:
    """Anchors, what lies beside them, and registers, in all tiles at once."""
    middle, deep = (tiles(scene, values) for values in scene.values)
    share = scene.keep // scene.shape[0]
    size, columns = middle.shape[2], scene.shape[2]
    anchors = middle.topk(round(share * scene.method.alpha / 5), -1).indices
    beside = (anchors[..., None] + torch.tensor([0, -1, 1, -columns, columns])).clamp(0, size - 1).flatten(2)
    union = torch.zeros_like(middle, dtype=torch.bool).scatter(2, beside, True)
    return (_ranks(torch.where(union, deep + 10, deep)) < share).flatten(1)


def hiprune_loop(scene: Scene) -> Tensor:
    marks, columns = [], scene.shape[2]
    share = scene.keep // scene.shape[0]
    for item in range(scene.items):
        middle, deep = (values.view(scene.shape[0], -1) for values in scene.item(item))
        places = []
        for tile in range(scene.shape[0]):
            size = len(middle[tile])
            anchors = middle[tile].topk(round(share * scene.method.alpha / 5)).indices
            around = [anchors + step for step in (0, -1, 1, -columns, columns)]
            union = torch.unique(torch.cat(around).clamp(0, size - 1))
            score = deep[tile].clone()
            score[union] -= 1e9
            registers = score.topk(share - len(union)).indices
            places.append(tile * size + torch.cat([union, registers]).sort().values)
        marks.append(torch.cat(places))
    return each(scene, marks)


# --- GlobalCom2
def _tiled(scene: Scene, z: Tensor) -> Tensor:
    """Marks [I, N] of thumbnail and crops with known tiling; z: [I, crops, n]."""
    method, (_, height, width) = scene.method, scene.shape
    rows, columns = scene.view.items.layouts[0].tiling  # type: ignore[misc]
    ratio = scene.view.keep[0] / scene.length
    picture = z[:, 0].view(-1, height, width)
    cells = picture.double().view(-1, rows, height // rows, columns, width // columns).sum((2, 4)).flatten(1)
    sigma = ((cells - cells.amax(1, keepdim=True)) / method.tau).exp()
    sigma = sigma / (sigma.sum(1, keepdim=True) + 1e-8)
    ratios = (ratio * (1 + sigma - sigma.mean(1, keepdim=True))).clamp(max=1)
    size = height * width
    shares = torch.cat([torch.full_like(ratios[:, :1], int(size * ratio)), (size * ratios).floor()], 1)
    overall = torch.nn.functional.interpolate(picture[:, None], size=(rows * height, columns * width), mode="bilinear")
    overall = overall.view(-1, rows, height, columns, width).transpose(2, 3).reshape(len(z), rows * columns, size)
    unit = torch.nn.functional.normalize
    score = torch.cat([z[:, :1], unit(z[:, 1:], dim=2) + unit(overall, dim=2)], 1)
    return (_ranks(score) < shares[..., None]).flatten(1)


def _framed(scene: Scene, z: Tensor) -> Tensor:
    """Marks of one tile, or of the frames of a video whose overview is nowhere: equal shares by z."""
    return best(z, scene.keep // scene.shape[0]).flatten(1)


def globalcom2_batched(scene: Scene) -> Tensor:
    """The thumbnail shares out the budget, then both views rank."""
    z = tiles(scene, scene.values[0])
    return _tiled(scene, z) if scene.view.items.layouts[0].tiling else _framed(scene, z)


def globalcom2_loop(scene: Scene) -> Tensor:
    """Patch after patch summed in Python, crop after crop ranked."""
    marks, (crops, height, width) = [], scene.shape
    tiling, method = scene.view.items.layouts[0].tiling, scene.method
    for item in range(scene.items):
        z = scene.item(item)[0].view(crops, -1)
        size = z.shape[1]
        if tiling is None:
            share = scene.keep // crops
            marks.append(torch.cat([c * size + row.topk(share).indices.sort().values for c, row in enumerate(z)]))
            continue
        ratio = scene.view.keep[0] / scene.length
        sums = [0.0] * (tiling[0] * tiling[1])
        for patch in range(size):
            row, column = patch // width // (height // tiling[0]), patch % width // (width // tiling[1])
            sums[row * tiling[1] + column] += z[0, patch].item()
        powers = [torch.tensor((value - max(sums)) / method.tau).exp().item() for value in sums]
        sigma = [power / (sum(powers) + 1e-8) for power in powers]
        mean = sum(sigma) / len(sigma)
        picture = z[0].view(1, 1, height, width)
        whole = (tiling[0] * height, tiling[1] * width)
        overall = torch.nn.functional.interpolate(picture, size=whole, mode="bilinear")[0, 0]
        places = [z[0].topk(int(size * ratio)).indices]
        for crop in range(1, crops):
            row, column = divmod(crop - 1, tiling[1])
            part = overall[row * height : (row + 1) * height, column * width : (column + 1) * width].flatten()
            score = z[crop] / z[crop].norm() + part / part.norm()
            kept = score.topk(int(size * min(1.0, ratio * (1 + sigma[crop - 1] - mean)))).indices
            places += [crop * size + torch.tensor(sorted(place.item() for place in kept))]  # token after token
        marks.append(torch.cat(places))
    return each(scene, marks)
