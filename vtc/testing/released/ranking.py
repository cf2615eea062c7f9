"""Methods that rank tokens by recorded numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testing.released import Scene


def best(scores: Tensor, keep: int) -> Tensor:
    """[..., N] marks of the highest scores."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(keep, -1).indices, True)


def each(scene: Scene, marks: list[Tensor]) -> Tensor:
    """Places that stayed of every image -> marks [I, N]."""
    kept = torch.zeros(scene.items, scene.length, dtype=torch.bool)
    for item, places in enumerate(marks):
        kept[item, places] = True
    return kept


def tiles(scene: Scene, values: Tensor) -> Tensor:
    """[I, N, ...] -> [I, crops, n, ...]."""
    return values.view(scene.items, scene.shape[0], -1, *values.shape[2:])


# --- draws and rasters
def random_batched(scene: Scene) -> Tensor:
    """k of each crop without replacement."""
    draws = torch.rand(scene.items, scene.shape[0], scene.length // scene.shape[0])
    return best(draws, scene.keep // scene.shape[0]).flatten(1)


def random_loop(scene: Scene) -> Tensor:
    """One generator per image."""
    marks = []
    for item in range(scene.items):
        generator = torch.Generator().manual_seed(item)
        size, places = scene.length // scene.shape[0], []
        for crop in range(scene.shape[0]):
            drawn = torch.randperm(size, generator=generator)[: scene.keep // scene.shape[0]]
            places.append(crop * size + drawn.sort().values)
        marks.append(torch.cat(places))
    return each(scene, marks)


def _strided(length: int, keep: int) -> Tensor:
    return ((torch.arange(keep) + 0.5) * length / keep).long()


def stride_batched(scene: Scene) -> Tensor:
    """floor((j + 1/2) N / k)."""
    kept = torch.zeros(scene.items, scene.length, dtype=torch.bool)
    kept[:, _strided(scene.length, scene.keep)] = True
    return kept


def stride_loop(scene: Scene) -> Tensor:
    return each(scene, [_strided(scene.length, scene.keep) for _ in range(scene.items)])


# --- attention of one row
def vtc_cls_batched(scene: Scene) -> Tensor:
    """The sum of the layers' class rows, in every crop by itself."""
    score = tiles(scene, torch.stack(scene.values).sum(0))
    return best(score, scene.keep // scene.shape[0]).flatten(1)


def vtc_cls_loop(scene: Scene) -> Tensor:
    marks = []
    for item in range(scene.items):
        score = torch.stack(scene.item(item)).sum(0).view(scene.shape[0], -1)
        size, share = score.shape[1], scene.keep // scene.shape[0]
        marks.append(torch.cat([crop * size + row.topk(share).indices.sort().values for crop, row in enumerate(score)]))
    return each(scene, marks)


def last_row_batched(scene: Scene) -> Tensor:
    """FastV, PyramidDrop, AIM: the k with the highest score."""
    return best(scene.values[0], scene.keep)


def last_row_loop(scene: Scene) -> Tensor:
    return each(scene, [scene.item(item)[0].topk(scene.keep).indices.sort().values for item in range(scene.items)])


# --- ATP
def _scaled(scores: Tensor) -> Tensor:
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    return (scores - low) / (high - low + 1e-12)


def _rates(scene: Scene, item: int) -> tuple[Tensor, Tensor]:
    """Rows of text and of vision of an item's prompt."""
    view, row = scene.view, scene.view.items.rows[item]
    asking = view.text[row] & (view.visual[row].cumsum(0) > 0)
    return asking.sum(), view.visual[row].sum()


def _all_rates(scene: Scene) -> tuple[Tensor, Tensor]:
    """Both as columns [I, 1]."""
    view, row = scene.view, scene.view.items.row
    return view.asking.sum(1)[row, None], view.visual.sum(1)[row, None]


def _grid(scene: Scene, strides: tuple[int, ...], rate: float) -> Tensor:
    """[N] spatial score of nested grids."""
    crops, rows, columns = scene.shape
    spatial = torch.zeros(rows, columns)
    for stride in sorted(strides):
        spatial[::stride, ::stride] = torch.maximum(
            spatial[::stride, ::stride], torch.tensor(max(0.0, 1 - rate / stride**2))
        )
    return spatial.flatten().repeat(crops)


def atp_batched(scene: Scene) -> Tensor:
    """Min-max scores, pooled to two vectors, thresholds by the trained network."""
    cross, own = scene.values[0]
    text, visual = (
        torch.stack(column)[:, None]
        for column in zip(*map(lambda i: _rates(scene, i), range(scene.items)), strict=True)
    )
    own, cross = _scaled(own / visual), _scaled(cross / text)
    return _passes(scene, own, cross)


def atp_loop(scene: Scene) -> Tensor:
    marks = []
    for item in range(scene.items):
        text, visual = _rates(scene, item)
        cross, own = scene.values[0][:, item : item + 1]
        marks.append(_passes(scene, _scaled(own / visual), _scaled(cross / text))[0].nonzero()[:, 0])
    return each(scene, marks)


def _passes(scene: Scene, own: Tensor, cross: Tensor) -> Tensor:
    part = scene.view.module.part(scene.view.stage - 1)  # type: ignore[union-attr,operator]
    pooled = torch.nn.functional.adaptive_avg_pool1d(torch.stack([own, cross], 1), part.bins).flatten(1)
    hidden = part.shared(pooled).relu()
    redundancy = (own + cross) / 2
    passed = redundancy > part.head_r(hidden).sigmoid()
    kept: Tensor = passed | (
        _grid(scene, scene.method.strides, scene.method.lambda_sample) > part.head_s(hidden).sigmoid()
    )
    return kept


def atp_counts_batched(scene: Scene) -> Tensor:
    """The tokens of the densest grid that fits a quarter of the budget, and the best others."""
    cross, own = scene.values[0]
    text, visual = (
        torch.stack(column)[:, None]
        for column in zip(*map(lambda i: _rates(scene, i), range(scene.items)), strict=True)
    )
    score = (_scaled(own / visual) + _scaled(cross / text)) / 2
    return best(torch.where(_densest(scene), 2.0, score), scene.keep)


def atp_counts_loop(scene: Scene) -> Tensor:
    marks = []
    for item in range(scene.items):
        text, visual = _rates(scene, item)
        cross, own = scene.values[0][:, item]
        score = (_scaled(own / visual) + _scaled(cross / text)) / 2
        marks.append(torch.where(_densest(scene), 2.0, score).topk(scene.keep).indices.sort().values)
    return each(scene, marks)


def _densest(scene: Scene) -> Tensor:
    crops, rows, columns = scene.shape
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    for stride in sorted(scene.method.strides, reverse=True):
        grid = torch.zeros_like(chosen)
        grid[::stride, ::stride] = True
        if crops * int(grid.sum()) <= scene.method.spatial_share * scene.keep:
            chosen = grid
    return chosen.flatten().repeat(crops)


# --- thresholds on the text's attention
def mustdrop_batched(scene: Scene) -> Tensor:
    """Tokens that the text looks at, and the key set."""
    (total, peak), salience = scene.values
    method = scene.method
    keep = (total >= method.gamma * total.sum(1, keepdim=True)) | (peak >= method.alpha)
    crops = tiles(scene, salience)
    kept: Tensor = keep | best(crops, -int(-method.key_rate * crops.shape[2] // 1)).flatten(1)
    return kept


def mustdrop_loop(scene: Scene) -> Tensor:
    marks, method = [], scene.method
    for item in range(scene.items):
        (total, peak), salience = scene.item(item)
        candidate = (total < method.gamma * total.sum()) & (peak < method.alpha)
        keys = []
        crops = salience.view(scene.shape[0], -1)
        for crop, row in enumerate(crops):
            keys.append(crop * len(row) + row.topk(-int(-method.key_rate * len(row) // 1)).indices)
        marks.append(torch.unique(torch.cat([(~candidate).nonzero()[:, 0], torch.cat(keys)])))
    return each(scene, marks)


def parted_batched(scene: Scene) -> Tensor:
    """ToDRE's second stage: every token of the rows whose text and image still attend to each other."""
    sums = next(iter(scene.view.llm_rows.values()))
    view = scene.view
    crossing = (sums[0] * view.visual).sum(1) / view.text.sum(1) < scene.method.tau
    crossing &= (sums[1] * view.text).sum(1) / view.visual.sum(1) < scene.method.tau
    kept: Tensor = ~crossing[view.items.row][:, None].expand(-1, scene.length)
    return kept


def parted_loop(scene: Scene) -> Tensor:
    view, marks = scene.view, []
    sums = next(iter(view.llm_rows.values()))
    for row in view.items.rows:
        seen, asked = view.visual[row], view.text[row]
        to_visual, to_text = sums[0, row][seen].sum() / asked.sum(), sums[1, row][asked].sum() / seen.sum()
        gone = bool(to_visual < scene.method.tau) and bool(to_text < scene.method.tau)
        marks.append(torch.arange(0 if gone else scene.length))
    return each(scene, marks)
