"""VQToken: k-means in torch, with `multinomial` for the draws."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testing.released import Scene


def _seeds(unit: Tensor, clusters: int) -> Tensor:
    """k-means++ of [I, N, D]."""
    item = torch.arange(len(unit))
    drawn = torch.randint(unit.shape[1], (len(unit),))
    centres, nearest = [unit[item, drawn]], torch.full(unit.shape[:2], torch.inf)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, torch.cdist(unit, centres[-1][:, None])[..., 0].square())
        centres.append(unit[item, torch.multinomial(nearest + 1e-6, 1)[:, 0]])
    return torch.stack(centres, 1)


def _clustered(tokens: Tensor, clusters: int, steps: int, tolerance: float) -> Tensor:
    """[I, N] labels: cosine k-means, means by a one-hot matrix."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    centres = _seeds(unit, clusters)
    for _ in range(steps):
        cosine = unit @ torch.nn.functional.normalize(centres, dim=-1).transpose(1, 2)
        labels = (1 - cosine).argmin(2)
        hot = torch.nn.functional.one_hot(labels, clusters).float()
        sizes = hot.sum(1)[..., None]
        updated = torch.where(sizes > 0, hot.transpose(1, 2) @ unit / sizes.clamp(min=1), centres)
        if (updated - centres).norm() < tolerance:
            break
        centres = updated
    return labels


def _codebook(tokens: Tensor, labels: Tensor, clusters: int) -> Tensor:
    hot = torch.nn.functional.one_hot(labels, clusters).float()
    return hot.transpose(1, 2) @ tokens / hot.sum(1).clamp(min=1)[..., None]


def _attended(scene: Scene, labels: Tensor, codes: Tensor) -> Tensor:
    """Rows of the trained block: one query per frame, repeated to the number of codes."""
    method, block = scene.method, scene.view.module["vq_attn"]  # type: ignore[index]
    maps = labels.view(len(labels), *scene.shape).float()
    frames = torch.nn.functional.interpolate(maps, size=method.grid, mode="nearest").flatten(2)
    count = max(frames.shape[1], codes.shape[1])
    queries = block.to_q_proj(frames)[:, torch.arange(count) % frames.shape[1]]
    mixed: Tensor = block.transformer_decoder(queries, codes[:, torch.arange(count) % codes.shape[1]])
    return mixed


def _rows(scene: Scene, tokens: Tensor) -> Tensor:
    """Rows of some items."""
    method = scene.method
    labels = _clustered(tokens, scene.keep, method.iterations or 50, method.tolerance)
    if scene.view.module is None:
        return _codebook(tokens, labels, scene.keep)
    codes = _codebook(torch.nn.functional.normalize(tokens, dim=-1), labels, scene.keep)
    return _attended(scene, labels, codes)


def vqtoken_batched(scene: Scene) -> Tensor:
    """All items at once, until all have converged."""
    return _rows(scene, scene.tokens)


def vqtoken_loop(scene: Scene) -> Tensor:
    """Video after video."""
    return torch.cat([_rows(scene, tokens[None]) for tokens in scene.tokens])
