"""DyCoke, EVS, VidCom2 and FrameFusion: frame after frame of a video; the last merges, and returns rows [I, K, D]."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.testing.released import Scene
from vtc.testing.released.ranking import best, each

unit = torch.nn.functional.normalize


def framed(scene: Scene, values: Tensor) -> Tensor:
    """[I, N, ...] -> [I, frames, n, ...]; an image is one frame, with all of its tiles."""
    frames = scene.shape[0] if scene.view.items.layouts[0].kind == "video" else 1
    return values.view(len(values), frames, -1, *values.shape[2:])


# --- DyCoke
def dycoke_batched(scene: Scene) -> Tensor:
    """The first of four frames, and of the three others what is least like an earlier one."""
    x = unit(framed(scene, scene.tokens), dim=3)
    frame = torch.arange(x.shape[1])
    thinned = frame % 4 != 0
    before = frame - 1 - (frame % 4 == 2).long()
    like = (x[:, thinned] * x[:, before[thinned]]).sum(3)
    kept = torch.ones(x.shape[:3], dtype=torch.bool)
    kept[:, thinned] = best(-like, _thin(scene, x.shape[1], x.shape[2]))
    return kept.flatten(1)


def _thin(scene: Scene, frames: int, size: int) -> int:
    """Tokens that a thinned frame keeps."""
    whole = -(-frames // 4)
    return (scene.keep - whole * size) // (frames - whole)


def dycoke_loop(scene: Scene) -> Tensor:
    """Pairs of frames, then the third of every four against the first."""
    marks = []
    for video in framed(scene, scene.tokens):
        frames, size = video.shape[:2]
        count = _thin(scene, frames, size)
        places = {frame: torch.arange(size) for frame in range(frames)}
        for step, first in ((1, 0), (2, 0), (1, 2)):
            for frame in range(first, frames - step, 4):
                like = torch.cosine_similarity(video[frame], video[frame + step], dim=1)
                places[frame + step] = like.topk(count, largest=False).indices.sort().values
        marks.append(torch.cat([frame * size + kept for frame, kept in places.items()]))
    return each(scene, marks)


# --- EVS
def evs_batched(scene: Scene) -> Tensor:
    """The first frame, and what changed most of all others."""
    x = framed(scene, scene.tokens)
    change = 1 - torch.cosine_similarity(x[:, 1:], x[:, :-1], dim=3)
    return best(torch.cat([torch.full_like(x[:, :1, :, 0], 255), change], 1).flatten(1), scene.keep)


def evs_loop(scene: Scene) -> Tensor:
    marks = []
    for video in framed(scene, scene.tokens):
        changes = [torch.full((video.shape[1],), 255.0)]
        for frame in range(1, len(video)):
            changes.append(1 - torch.cosine_similarity(video[frame], video[frame - 1], dim=1))
        marks.append(torch.cat(changes).argsort(descending=True, stable=True)[: scene.keep].sort().values)
    return each(scene, marks)


# --- VidCom2
def _nearness(x: Tensor, centre: Tensor) -> Tensor:
    square = (x - centre).square().sum(-1)
    return torch.stack([(-square / (2 * width)).exp() for width in (1 / 8, 1 / 4, 1 / 2, 1, 2)]).sum(0)


def _uniqueness(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """How near tokens [I, F, n, D] are to their video, and to it and their frame together; two [I, F, n]."""
    flat = tokens.flatten(1, 2)
    lowest = flat.var(1, unbiased=False).topk(tokens.shape[3] // 2, largest=False).indices
    x = unit(tokens.gather(3, lowest[:, None, None].expand(*tokens.shape[:3], -1)), dim=3)
    video = _nearness(x, x.mean((1, 2), keepdim=True))
    return video, video + _nearness(x, x.mean(2, keepdim=True))


def vidcom2_batched(scene: Scene) -> Tensor:
    """Frames that stand out get more, and keep what stands out."""
    video, near = _uniqueness(framed(scene, scene.tokens))
    frames = video.shape[1]
    odd = (-video.mean(2) / scene.method.temperature).softmax(1)
    exact = scene.keep / frames * (1 + odd.double() - 1 / frames)
    quota = exact.floor()
    rest = (exact - quota).argsort(dim=1, descending=True, stable=True).argsort(1)
    quota += rest < (scene.keep - quota.sum(1, keepdim=True))
    rank = near.argsort(dim=2, stable=True).argsort(2)
    kept: Tensor = rank < quota[..., None]
    return kept.flatten(1)


def vidcom2_loop(scene: Scene) -> Tensor:
    marks = []
    for tokens in framed(scene, scene.tokens):
        video, near = (each[0] for each in _uniqueness(tokens[None]))
        frames, size = video.shape
        odd = (-video.mean(1) / scene.method.temperature).softmax(0).tolist()
        exact = [scene.keep / frames * (1 + p - 1 / frames) for p in odd]
        quota = [int(share) for share in exact]
        falling = sorted(range(frames), key=lambda f: (quota[f] - exact[f], f))
        for frame in falling[: scene.keep - sum(quota)]:
            quota[frame] += 1
        columns = enumerate(zip(near, quota, strict=True))
        places = [f * size + row.topk(k, largest=False).indices.sort().values for f, (row, k) in columns]
        marks.append(torch.cat(places))
    return each(scene, marks)


# --- FrameFusion
def framefusion_batched(scene: Scene) -> Tensor:
    """The places most like those of the frame before join it, as many as the budget asks for; runs become means."""
    x = framed(scene, scene.tokens)
    like = torch.cosine_similarity(x[:, 1:], x[:, :-1], dim=3)
    joins = best(like.flatten(1), scene.length - scene.keep).view_as(like)
    stays = torch.nn.functional.pad(~joins, (0, 0, 1, 0), value=True)
    frames = torch.arange(x.shape[1])[:, None]
    root = torch.where(stays, frames, 0).cummax(1).values * x.shape[2] + torch.arange(x.shape[2])
    root = root.flatten(1)
    sums = torch.zeros_like(scene.tokens).scatter_add(1, root[..., None].expand_as(scene.tokens), scene.tokens)
    count = torch.zeros(root.shape).scatter_add(1, root, torch.ones_like(root).float())
    return (sums / count.clamp(min=1)[..., None])[stays.flatten(1)].view(scene.items, scene.keep, -1)


def framefusion_loop(scene: Scene) -> Tensor:
    found = []
    for video in framed(scene, scene.tokens):
        like = torch.stack([torch.cosine_similarity(a, b, dim=1) for a, b in zip(video[1:], video[:-1], strict=True)])
        joins = torch.zeros(like.numel(), dtype=torch.bool)
        joins[like.flatten().topk(scene.length - scene.keep).indices] = True
        joins = joins.view_as(like)
        sums, count = video.clone(), torch.ones(video.shape[:2])
        for frame in range(len(video) - 1, 0, -1):  # what joined a frame goes on with it
            gone = joins[frame - 1]
            sums[frame - 1, gone] += sums[frame, gone]
            count[frame - 1, gone] += count[frame, gone]
        stays = torch.cat([torch.ones_like(joins[:1]), ~joins])
        found.append((sums / count[..., None])[stays])
    return torch.stack(found)
