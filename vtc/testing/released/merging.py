"""Methods that make new rows: pooling, TRIM, ToMe, PiToMe, LongVLM, AIM, VisionZip, VScan, MustDrop; [I, K, D]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vtc.ops.grid import output_raster
from vtc.ops.merge import merge_plan
from vtc.testing.released import Scene
from vtc.testing.released.ranking import best, tiles

unit = torch.nn.functional.normalize


def by_item(form: Callable[..., Tensor]) -> Callable[[Scene], Tensor]:
    """`form(scene, tokens [I, C, n, D], values [I, C, n, ...] ...)` image after image."""

    def loop(scene: Scene) -> Tensor:
        given = [tiles(scene, each) for each in (scene.tokens, *scene.values)]
        return torch.cat([form(scene, *(each[item : item + 1] for each in given)) for item in range(scene.items)])

    return loop


def at_once(form: Callable[..., Tensor]) -> Callable[[Scene], Tensor]:
    """The same with all images at once."""
    return lambda scene: form(scene, *(tiles(scene, each) for each in (scene.tokens, *scene.values)))


def pool(scene: Scene, tokens: Tensor) -> Tensor:
    """Adaptive average pooling of every frame."""
    items, crops, _, width = tokens.shape
    output = output_raster(scene.shape, scene.keep)
    flat = tokens.reshape(items * crops, *scene.shape[1:], width).permute(0, 3, 1, 2)
    if output[0] == crops:
        pooled = torch.nn.functional.adaptive_avg_pool2d(flat, output[1:])
        return pooled.flatten(2).transpose(1, 2).reshape(items, -1, width)
    whole = flat.reshape(items, crops, width, *scene.shape[1:]).transpose(1, 2)
    return torch.nn.functional.adaptive_avg_pool3d(whole, output).flatten(2).transpose(1, 2)


def trim(scene: Scene, tokens: Tensor, compared: Tensor) -> Tensor:
    """Of every crop the patches least like the question, and the mean of the others behind them."""
    x, (question, *_) = tokens.flatten(0, 1), scene.view.pair(scene.method.pair).texts
    marks = best(-(compared.flatten(0, 1) @ question), scene.keep // scene.shape[0] - 1)
    mean = torch.where(marks[..., None], 0, x).sum(1, keepdim=True) / (~marks).sum(1)[:, None, None]
    return torch.cat([x[marks].view(len(x), -1, x.shape[2]), mean], 1).view(len(tokens), -1, x.shape[2])


def _match(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Even tokens that stay and that go, [G, .], and the odd token that each of the latter goes to."""
    a, b = unit(metric[:, ::2], dim=-1), unit(metric[:, 1::2], dim=-1)
    value, partner = (a @ b.transpose(1, 2)).max(-1)
    edges = value.argsort(dim=-1, descending=True)
    return edges[:, r:], edges[:, :r], partner.gather(1, edges[:, :r])


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows [G, K, D] of [G, M, D] by their places [G, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _added(odd: Tensor, gone: Tensor, into: Tensor) -> Tensor:
    return odd.scatter_add(1, into[..., None].expand_as(gone), gone)


def tome(scene: Scene, tokens: Tensor, keys: Tensor) -> Tensor:
    """Repeated bipartite matching on keys, means weighted by sizes; behind each other in the order of the targets."""
    items, crops, length, width = tokens.shape
    x, metric = tokens.flatten(0, 1), keys.flatten(0, 1)
    size = torch.ones(len(x), length, 1)
    place = torch.arange(length).expand(len(x), -1)
    for r in merge_plan(length, scene.keep // crops):
        stay, gone, into = _match(metric, r)
        merged = []
        for values in (x * size, metric * size, size):
            even, odd = values[:, ::2], values[:, 1::2]
            merged.append(torch.cat([pick(even, stay), _added(odd, pick(even, gone), into)], 1))
        place = torch.cat([place[:, ::2].gather(1, stay), place[:, 1::2]], 1)
        size = merged[2]
        x, metric = merged[0] / size, merged[1] / size
    return pick(x, place.argsort(1)).view(items, -1, width)


def pitome(scene: Scene, tokens: Tensor, keys: Tensor) -> Tensor:
    """Of the tokens that many others resemble every other one joins one of the rest; means weighted by sizes."""
    items, crops, length, width = tokens.shape
    model = scene.view.model
    margin = 0.9 - 0.9 * model.key_layer / (model.feature_layer + 1)
    x, metric = tokens.flatten(0, 1), keys.flatten(0, 1)
    size = torch.ones(len(x), length, 1)
    place = torch.arange(length).expand(len(x), -1)
    for r in merge_plan(length, scene.keep // crops):
        direction = unit(metric, dim=-1)
        energy = torch.nn.functional.elu(direction @ direction.transpose(1, 2) - margin).mean(2)
        order = energy.argsort(dim=1, descending=True)
        gone, into, alone = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2], order[:, 2 * r :]
        partner = (pick(direction, gone) @ pick(direction, into).transpose(1, 2)).argmax(2)
        merged = []
        for values in (x * size, metric * size, size):
            joined = _added(pick(values, into), pick(values, gone), partner)
            merged.append(torch.cat([pick(values, alone), joined], 1))
        place = torch.cat([place.gather(1, alone), place.gather(1, into)], 1)
        size = merged[2]
        x, metric = merged[0] / size, merged[1] / size
    return pick(x, place.argsort(1)).view(items, -1, width)


def longvlm(scene: Scene, tokens: Tensor, features: Tensor) -> Tensor:
    """ToMe's matching over the frames of each clip together, by features whose heads are averaged."""
    items, clips = len(tokens), scene.method.clips
    metric = features.reshape(*features.shape[:3], scene.method.heads, -1).mean(3)
    return tome(scene, *(each.reshape(items, clips, -1, each.shape[3]) for each in (tokens, metric)))


def aim(scene: Scene, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
    """Repeated matching with plain means; rows in the order of the algorithm."""
    items, crops, length, width = tokens.shape
    x = tokens.flatten(0, 1)
    metric = x if keys is None else keys.flatten(0, 1)
    for r in merge_plan(length, scene.keep // crops):
        stay, gone, into = _match(metric, r)
        count = torch.ones(len(x), metric.shape[1] // 2).scatter_add(1, into, torch.ones_like(into).float())
        merged = []
        for values in (x, metric) if keys is not None else (x,):
            even, odd = values[:, ::2], values[:, 1::2]
            merged.append(torch.cat([pick(even, stay), _added(odd, pick(even, gone), into) / count[..., None]], 1))
        x, metric = merged[0], merged[-1]
    return x.view(items, -1, width)


def visionzip(scene: Scene, tokens: Tensor, score: Tensor, keys: Tensor) -> Tensor:
    """Dominant tokens by attention; the others go to evenly spaced targets through a one-hot matrix."""
    items, crops, length, width = tokens.shape
    x, metric, score = tokens.flatten(0, 1), unit(keys.flatten(0, 1), dim=-1), score.flatten(0, 1)
    groups = len(x)
    share = scene.keep // crops
    dominant = math.floor(share * scene.method.share + 0.5)
    contextual = share - dominant
    mask = torch.ones(groups, length, dtype=torch.bool).scatter(1, score.topk(dominant, 1).indices, False)
    rest = x[mask].view(groups, length - dominant, width)
    left = metric[mask].view(groups, length - dominant, -1)
    step = max(1, (length - dominant) // contextual)
    number = torch.arange(0, length - dominant, step)[:contextual]
    others = torch.ones(length - dominant, dtype=torch.bool)
    others[number] = False
    nearest = (left[:, others] @ left[:, number].transpose(1, 2)).argmax(2)
    hot = torch.zeros(groups, int(others.sum()), contextual).scatter(2, nearest[..., None], 1)
    total = hot.transpose(1, 2) @ rest[:, others]
    merged = rest[:, number] + total / hot.sum(1).clamp(min=1)[..., None]
    places = torch.arange(length).expand(groups, -1)
    order = torch.cat([places[~mask].view(groups, -1), places[mask].view(groups, -1)[:, number]], 1).argsort(1)
    rows = torch.cat([x[~mask].view(groups, dominant, width), merged], 1)
    return pick(rows, order).view(items, -1, width)


def vscan(scene: Scene, tokens: Tensor, early: Tensor, late: Tensor) -> Tensor:
    """The best of every window early in the encoder, the best of the others late; all that is dropped joins those."""
    items, crops, length, width = tokens.shape
    side, (rows, columns) = 6, scene.shape[1:]
    share = scene.keep // crops
    number = torch.arange(length).view(rows // side, side, columns // side, side).transpose(1, 2).reshape(-1, side**2)
    best = early.flatten(0, 1)[:, number].topk(share // 2 // len(number), 2).indices
    local = number[torch.arange(len(number))[:, None], best].flatten(1)
    kept = torch.zeros(items * crops, length, dtype=torch.bool).scatter(1, local, True)
    later = late.flatten(0, 1).masked_fill(kept, -torch.inf).topk(share - local.shape[1], 1).indices
    kept = kept.scatter(1, later, True)
    x = tokens.flatten(0, 1)
    targets = x[kept].view(len(x), share, width)
    nearest = (unit(x, dim=2) @ unit(targets, dim=2).transpose(1, 2)).argmax(2)
    nearest[kept] = torch.arange(share).repeat(len(x))
    hot = torch.nn.functional.one_hot(nearest, share).float()
    return (hot.transpose(1, 2) @ x / hot.sum(1)[..., None]).view(items, -1, width)


def mustdrop_windows(scene: Scene, tokens: Tensor, *_: Tensor) -> Tensor:
    """The most uniform windows of every image become one token each, in front of all others."""
    items, crops, length, width = tokens.shape
    (rows, columns), (wide, high) = scene.shape[1:], scene.method.window
    assert crops == 1, "as released: one crop per image"
    fits = tokens.view(items, rows // wide, wide, columns // high, high, width)
    windows = fits.permute(0, 1, 3, 2, 4, 5).reshape(items, -1, wide * high, width)
    direction = unit(windows, dim=-1)
    like = direction @ direction.transpose(-1, -2)
    k = wide * high
    similarity = (like.sum((-1, -2)) - like.diagonal(dim1=-2, dim2=-1).sum(-1)) / (k * (k - 1))
    r = (length - scene.keep) // (k - 1)
    chosen = similarity.topk(r, 1).indices
    means = pick(windows.mean(2), chosen)
    number = torch.arange(length).view(rows // wide, wide, columns // high, high).permute(0, 2, 1, 3).reshape(-1, k)
    gone = torch.zeros(items, length, dtype=torch.bool)
    gone.scatter_(1, number[chosen].flatten(1), True)
    rest = tokens[:, 0][~gone].view(items, -1, width)
    return torch.cat([means, rest], 1)
