"""Cosine redundancy, G-Prune, token-level correlation: how much tokens, or crops, repeat each other."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testing.released import Scene
from vtc.testing.released.ranking import best, each, tiles

unit = torch.nn.functional.normalize


# --- Cosine redundancy
def cosine_batched(scene: Scene) -> Tensor:
    """The tokens of lowest cosine with the sum of all."""
    rows = unit(scene.tokens, dim=2)
    return best(-(rows @ rows.sum(1)[..., None])[..., 0], scene.keep)


def cosine_loop(scene: Scene) -> Tensor:
    rows = [unit(tokens, dim=1) for tokens in scene.tokens]
    return each(scene, [(row @ row.sum(0)).topk(scene.keep, largest=False).indices.sort().values for row in rows])


# --- G-Prune
def _walked(scene: Scene, tokens: Tensor) -> Tensor:
    """Marks [I, C, n] of tokens [I, C, n, D]: a walk over the graph of alike tokens, by a power of its matrix."""
    rows, method = unit(tokens, dim=3), scene.method
    edges = rows @ rows.transpose(2, 3)
    edges = torch.where(edges < method.threshold, 0, edges) / method.tau
    degree = (edges > 0).sum(3)
    walk = torch.where(edges == 0, -5000.0, edges).softmax(3)
    arrived = (tokens.norm(dim=3)[:, :, None] @ torch.linalg.matrix_power(walk, method.steps))[:, :, 0]
    return best(arrived / degree, scene.keep // scene.shape[0])


def gprune_batched(scene: Scene) -> Tensor:
    """All crops at once."""
    return _walked(scene, tiles(scene, scene.tokens)).flatten(1)


def gprune_loop(scene: Scene) -> Tensor:
    """Crop after crop."""
    crops = tiles(scene, scene.tokens).flatten(0, 1)
    return torch.cat([_walked(scene, tokens[None, None]) for tokens in crops]).view(scene.items, -1)


# --- Token-level correlation
def correlation_batched(scene: Scene) -> Tensor:
    """Crops share the tokens by how many of their patches repeat no earlier one; two layers' attention chooses."""
    keys, deep, middle = (tiles(scene, values) for values in scene.values)
    rows = unit(keys, dim=3)
    repeats = ((rows @ rows.transpose(2, 3)).tril(-1) > scene.method.threshold).any(3)
    alone = (~repeats).sum(2)
    exact = scene.keep * alone.double() / alone.sum(1, keepdim=True)
    quota = exact.floor()
    rest = (exact - quota).argsort(dim=1, descending=True, stable=True).argsort(1)
    quota = quota + (rest < scene.keep - quota.sum(1, keepdim=True))
    first = (quota * scene.method.share + 0.5).floor()
    kept: Tensor = (_rank(deep) < first[..., None]) | (_rank(middle) < (quota - first)[..., None])
    again = _rank(deep.masked_fill(kept, -1))
    kept = kept | (again < (quota - kept.sum(2))[..., None])
    return kept.flatten(1)


def _rank(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def correlation_loop(scene: Scene) -> Tensor:
    marks, crops = [], scene.shape[0]
    for item in range(scene.items):
        keys, deep, middle = (values.view(crops, -1, *values.shape[1:]) for values in scene.item(item))
        size, alone = keys.shape[1], []
        for crop in keys:
            rows = unit(crop, dim=1)
            like = rows @ rows.T
            alone.append(sum(not bool((like[j, :j] > scene.method.threshold).any()) for j in range(size)))
        exact = [scene.keep * count / sum(alone) for count in alone]
        quota = [int(share) for share in exact]
        for crop in sorted(range(crops), key=lambda c: (quota[c] - exact[c], c))[: scene.keep - sum(quota)]:
            quota[crop] += 1
        for crop, count in enumerate(quota):
            first = int(count * scene.method.share + 0.5)
            falling = deep[crop].argsort(descending=True).tolist()
            kept = {*falling[:first], *middle[crop].argsort(descending=True).tolist()[: count - first]}
            kept |= set([token for token in falling if token not in kept][: count - len(kept)])
            marks.append((item, [crop * size + token for token in kept]))
    chosen = torch.zeros(scene.items, scene.length, dtype=torch.bool)
    for item, places in marks:
        chosen[item, places] = True
    return chosen
