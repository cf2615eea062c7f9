"""H2O, SnapKV, PyramidKV, VL-Cache, StreamingLLM and LOOK-M: what stays in the cache of a layer, in every KV head.

Released code looks at the cache of one prompt; here at the entries of an image in it, its text staying. LOOK-M merges,
and returns keys and values [I, H, K, 2 W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.method.base import CacheStage
from vtc.testing.released import Scene
from vtc.testing.released.ranking import best

unit = torch.nn.functional.normalize


def _marked(scene: Scene, places: list[Tensor]) -> Tensor:
    """Places [H, K] that stayed of every image -> marks [I, H, N]."""
    kept = torch.zeros(scene.items, len(places[0]), scene.length, dtype=torch.bool)
    for item, each in enumerate(places):
        kept[item].scatter_(1, each, True)
    return kept


def _layer(scene: Scene) -> int:
    assert isinstance(scene.view.stage, CacheStage)
    return scene.view.stage.from_layer


# --- H2O
def h2o_batched(scene: Scene) -> Tensor:
    """The last entries, and of the others those that drew most attention from all rows."""
    score = scene.values[0].transpose(0, 1).clone()
    score[..., scene.length - int(scene.method.recent * scene.keep) :] = torch.inf
    return best(score, scene.keep)


def _heavy(scene: Scene, item: int) -> Tensor:
    """[H, K] places of one image."""
    recent = int(scene.method.recent * scene.keep)
    score = scene.item(item)[0]
    heavy = score[:, : scene.length - recent].topk(scene.keep - recent, 1).indices
    late = torch.arange(scene.length - recent, scene.length).expand(len(score), -1)
    return torch.cat([heavy, late], 1).sort(1).values


def h2o_loop(scene: Scene) -> Tensor:
    return _marked(scene, [_heavy(scene, item) for item in range(scene.items)])


# --- SnapKV, PyramidKV
def _paid(scene: Scene) -> Tensor:
    """[H, B, L] what the last rows of every prompt pay to its keys."""
    (rows,) = (rows for (layer, _), rows in scene.view.llm_rows.items() if layer == _layer(scene))
    return rows


def _pooled(scene: Scene, paid: Tensor) -> Tensor:
    """[..., L] what is paid to the keys in front of the last rows, averaged over neighbours."""
    before, kernel = paid[..., : -scene.method.window], scene.method.kernel
    pooled = torch.nn.functional.avg_pool1d(before, kernel, stride=1, padding=kernel // 2)
    return torch.nn.functional.pad(pooled, (0, scene.method.window))


def _capacity(scene: Scene) -> int:
    """Entries that stay in the layer: under PyramidKV a line that falls from the first to the last one."""
    if not hasattr(scene.method, "beta"):
        return scene.view.keep[0]
    mean, layers = scene.view.keep[0], scene.view.model.llm_layers
    least = max(1, mean // scene.method.beta)
    return int(2 * mean - least - 2 * (mean - least) * _layer(scene) / (layers - 1) + 0.5)


def snapkv_batched(scene: Scene) -> Tensor:
    """The window, the latest first, and what it attends to most."""
    paid, index, row = _paid(scene), scene.view.items.index, scene.view.items.row[:, None]
    score = _pooled(scene, paid)[:, row, index].transpose(0, 1)
    inside = index >= paid.shape[2] - scene.method.window
    return best(torch.where(inside[:, None], 1.0 + index[:, None], score), _capacity(scene))


def snapkv_loop(scene: Scene) -> Tensor:
    places, paid, count = [], _paid(scene), _capacity(scene)
    for row, index in zip(scene.view.items.rows, scene.view.items.index, strict=True):
        score = _pooled(scene, paid[:, row])[:, index]
        outside = int((index < paid.shape[2] - scene.method.window).sum())
        recent = min(count, scene.length - outside)
        top = score[:, :outside].topk(count - recent, 1).indices
        late = torch.arange(scene.length - recent, scene.length).expand(len(score), -1)
        places.append(torch.cat([top, late], 1))
    return _marked(scene, places)


# --- VL-Cache
def _densities(scene: Scene) -> Tensor:
    """[B, layers] share of the entries that the question looks at."""
    return torch.stack([rows[0, :, 0] for rows in scene.view.llm_rows.values()], 1)


def _entries(scene: Scene, density: Tensor) -> Tensor:
    """[..., layers] entries of every layer in proportion to its density; the largest remainders make up the mean."""
    mean, layers = scene.view.keep[0], density.shape[-1]
    exact = density.double() / density.double().sum(-1, keepdim=True) * mean * layers
    exact = exact.clamp(scene.method.floor * scene.length, scene.length)
    whole = exact.floor()
    missing = mean * layers - whole.sum(-1, keepdim=True)
    rank = (exact - whole).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (whole + (rank < missing)).long()


def vlcache_batched(scene: Scene) -> Tensor:
    """In every head what the rows behind the image attend to."""
    count = _entries(scene, _densities(scene))[scene.view.items.row, _layer(scene)]
    score = scene.values[0][1:].transpose(0, 1)
    falling = score.topk(int(count.max()), 2).values
    return score >= falling.gather(2, (count - 1)[:, None, None].expand(-1, score.shape[1], 1))


def vlcache_loop(scene: Scene) -> Tensor:
    density, kept = _densities(scene), []
    for item, row in enumerate(scene.view.items.rows):
        count = int(_entries(scene, density[row])[_layer(scene)])
        kept.append(best(scene.values[0][1:, item], count))
    return torch.stack(kept)


# --- StreamingLLM
def _ends(scene: Scene) -> Tensor:
    """[N] the first and the last entries."""
    sinks = min(scene.method.sinks, scene.keep)
    kept = torch.zeros(scene.length, dtype=torch.bool)
    kept[:sinks] = True
    kept[scene.length - scene.keep + sinks :] = True
    return kept


def streaming_batched(scene: Scene) -> Tensor:
    """The same of all images."""
    return _ends(scene).expand(scene.items, -1)


def streaming_loop(scene: Scene) -> Tensor:
    return torch.stack([_ends(scene) for _ in range(scene.items)])


# --- LOOK-M
def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def _pivoted(x: Tensor, kept: Tensor, gone: Tensor, partner: Tensor) -> Tensor:
    """[..., K, W] rows that stay, each the mean of itself and the points half-way to those that leave for it."""
    stays, into = _pick(x, kept), partner[..., None].expand(*partner.shape, x.shape[-1])
    half_way = (_pick(x, gone) + stays.gather(-2, into)) / 2
    return stays.scatter_reduce(-2, into, half_way, "mean", include_self=True)


def _looked(keys: Tensor, values: Tensor, kept: Tensor, gone: Tensor) -> Tensor:
    """Keys and values [..., N, W] after the merge; kept, gone: places [..., K] and [..., N - K], rising."""
    like = unit(_pick(keys, gone), dim=-1) @ unit(_pick(keys, kept), dim=-1).transpose(-1, -2)
    partner = like.argmax(-1)
    return torch.cat([_pivoted(x, kept, gone, partner) for x in (keys, values)], -1)


def lookm_batched(scene: Scene) -> Tensor:
    """H2O's choice; every other entry joins the one that stays whose key is most like its own."""
    marks = h2o_batched(scene)
    kept, gone = (each.nonzero()[:, 2].view(*marks.shape[:2], -1) for each in (marks, ~marks))
    return _looked(*scene.view.entries, kept, gone)


def lookm_loop(scene: Scene) -> Tensor:
    found = []
    for item, entries in enumerate(zip(*scene.view.entries, strict=True)):
        kept = _heavy(scene, item)
        left = torch.ones(len(kept), scene.length, dtype=torch.bool).scatter(1, kept, False)
        found.append(_looked(*entries, kept, left.nonzero()[:, 1].view(len(kept), -1)))
    return torch.stack(found)
