"""FastVID, FlashVID and HoliTom: videos cut where they change; all merge, and return rows [I, K, D]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtc.testing.released import Scene
from vtc.testing.released.peaks import density_peaks, means, prominence
from vtc.testing.released.ranking import best

unit = torch.nn.functional.normalize


# --- FastVID
def fastvid(scene: Scene, tokens: Tensor, score: Tensor) -> Tensor:
    """Attended tokens of every frame; the others join dense ones of the last of every four frames of their segment."""
    items, frames, _, width = tokens.shape
    method, share = scene.method, scene.keep // frames
    context = int(share * method.context)
    segment, behind = _segments(tokens.mean(2), method.segments, method.threshold)
    attended = best(score, share - context)
    place = (~attended).nonzero()[:, 2].view(items, frames, -1)
    free = tokens.gather(2, place[..., None].expand(-1, -1, -1, width))
    member = segment[:, :, None] == segment[:, None]
    leads = behind % method.step == 0
    quota = leads * (context * member.sum(2) // (member & leads[:, None]).sum(2))
    rank = prominence(free.flatten(0, 1), 4).argsort(dim=1, descending=True, stable=True).argsort(1)
    anchor = (rank < quota.flatten()[:, None]).view(items, frames, -1)
    rows, direction = free.clone(), unit(free, dim=3).flatten(1, 2)
    for frame in range(frames):
        like = direction @ unit(free[:, frame], dim=2).transpose(1, 2)
        nearest = like.masked_fill(~anchor[:, frame, None], -torch.inf).argmax(2)
        hot = torch.nn.functional.one_hot(nearest, free.shape[2]).float()
        hot = hot * member[:, frame].repeat_interleave(free.shape[2], 1)[..., None]
        count = hot.sum(1)
        mean = hot.transpose(1, 2) @ free.flatten(1, 2) / count.clamp(min=1)[..., None]
        own = (1 / (count + 1)).clamp(min=method.own)[..., None]
        rows[:, frame] = own * free[:, frame] + (1 - own) * mean
    merged = tokens.scatter(2, place[..., None].expand_as(rows), rows)
    kept = attended.scatter(2, place, anchor)
    return merged[kept].view(items, scene.keep, width)


def _segments(features: Tensor, count: int, threshold: float) -> tuple[Tensor, Tensor]:
    """[I, F] the segment of each frame, and how many frames of it follow; features: [I, F, D]."""
    like = torch.cosine_similarity(features[:, 1:], features[:, :-1], dim=2)
    cut = (like < threshold) | best(-like, min(count - 1, like.shape[1]))
    segment = torch.nn.functional.pad(cut.cumsum(1), (1, 0))
    frame = torch.arange(features.shape[1])
    last = torch.where(segment[:, :, None] == segment[:, None], frame, 0).amax(2)
    return segment, last - frame


# --- FlashVID
def flashvid(scene: Scene, tokens: Tensor, score: Tensor) -> Tensor:
    """Attended tokens of every frame that differ; trees of the others along the frames, clusters of these trees."""
    items, frames, size, width = tokens.shape
    method, share = scene.method, scene.keep // frames
    first = math.ceil(method.diverse * share - 1e-9)
    middle = tokens.mean(2)
    segment, _ = _segments(middle, method.segments, method.threshold)
    member = (segment[:, :, None] == segment[:, None]).float()
    towards = member @ middle / member.sum(2, keepdim=True)
    weight = score * (tokens @ towards[..., None])[..., 0].clamp(min=0)
    diverse = _diverse(tokens.flatten(0, 1), weight.flatten(0, 1), first).view(items, frames, size)
    place = (~diverse).nonzero()[:, 2].view(items, frames, -1)
    free = tokens.gather(2, place[..., None].expand(-1, -1, -1, width))
    spends = member.sum(2).long() * (share - first)
    linked, parent = _links(free, segment, spends, method.similarity)
    sums, count = free.clone(), torch.ones(free.shape[:3])
    for frame in range(frames - 1, 0, -1):  # what hangs on another token goes on with it
        hangs, into = linked[:, frame].float(), parent[:, frame]
        gone = sums[:, frame] * hangs[..., None]
        sums[:, frame - 1].scatter_add_(1, into[..., None].expand_as(gone), gone)
        count[:, frame - 1].scatter_add_(1, into, count[:, frame] * hangs)
    mean = sums / count[..., None]
    root = ~linked
    quota = _quota(root.sum(2), spends, member.long())
    flat, real = mean.flatten(0, 1), root.flatten(0, 1)
    centre, into = density_peaks(flat, quota.flatten(), 7, real)
    rows = torch.where(centre[..., None], means(flat, into, real), flat).view(free.shape)
    merged = tokens.scatter(2, place[..., None].expand_as(rows), rows)
    kept = diverse.scatter(2, place, centre.view(place.shape))
    return merged[kept].view(items, scene.keep, width)


def _diverse(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """Marks [G, n] of the tokens farthest from those chosen before, a distance counting by the new one's weight."""
    direction, group = unit(x, dim=2), torch.arange(len(x))
    distance = (1 - direction @ direction.transpose(1, 2)) * weight[:, None]
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    token = distance.amin(1).argmax(1)
    nearest = torch.full_like(weight, torch.inf)
    marks = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(count):
        marks[group, token] = True
        nearest = torch.minimum(nearest, distance[group, token])
        token = nearest.masked_fill(marks, -1).argmax(1)
    return marks


def _links(free: Tensor, segment: Tensor, spends: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """[I, F, m] which tokens hang on one of the frame before, and on which: the most similar links of each segment.

    spends: [I, F] roots that its segment is to have at least.
    """
    size, direction = free.shape[2], unit(free, dim=3)
    alike, parent = (direction[:, 1:] @ direction[:, :-1].transpose(2, 3)).max(3)
    same = (segment[:, 1:] == segment[:, :-1])[..., None]
    alike = torch.nn.functional.pad(alike.masked_fill(~same | (alike <= threshold), -2), (0, 0, 1, 0), value=-2)
    order = (alike.double() - 4 * segment[..., None]).flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1).view(alike.shape)
    member = segment[:, :, None] == segment[:, None]
    begin = member.long().argmax(2) * size
    most = member.sum(2) * size - spends
    return (alike > -2) & (rank - begin[..., None] < most[..., None]), torch.nn.functional.pad(parent, (0, 0, 1, 0))


def _quota(roots: Tensor, spends: Tensor, member: Tensor) -> Tensor:
    """[I, F] clusters of each frame: what its segment spends by numbers of roots, the largest remainders rounded up."""
    total = (member * roots[:, None]).sum(2)
    whole, rest = spends * roots // total, spends * roots % total
    frame = torch.arange(roots.shape[1])
    before = (rest[:, None] > rest[..., None]) | ((rest[:, None] == rest[..., None]) & (frame < frame[:, None]))
    return whole + ((before * member).sum(2) < spends - (member * whole[:, None]).sum(2))


# --- HoliTom
def holitom(scene: Scene, tokens: Tensor, score: Tensor) -> Tensor:
    """One token for what stays the same over a window; then attended tokens of frames, dense ones of windows."""
    items, frames, size, width = tokens.shape
    like = torch.cosine_similarity(tokens[:, 1:], tokens[:, :-1], dim=3)
    first, still = _windows(like > scene.method.threshold)
    root = torch.where(still, first[..., None], torch.arange(frames)[:, None]) * size + torch.arange(size)
    merged = means(tokens.flatten(1, 2), root.flatten(1)).view(tokens.shape)
    leads = still & (torch.arange(frames) == first)[..., None]
    single = ~still
    sizes = torch.cat([leads.sum(2), single.sum(2)], 1)
    exact = sizes * scene.keep
    whole = exact // sizes.sum(1, keepdim=True)
    rest = (exact - whole * sizes.sum(1, keepdim=True)).argsort(dim=1, descending=True, stable=True).argsort(1)
    clusters, attended = (whole + (rest < scene.keep - whole.sum(1, keepdim=True))).chunk(2, 1)
    rank = score.masked_fill(~single, -1).argsort(dim=2, descending=True, stable=True).argsort(2)
    kept = rank < attended[..., None]
    flat, real = merged.flatten(0, 1), leads.flatten(0, 1)
    centre, into = density_peaks(flat, clusters.flatten(), clusters.flatten().clamp(max=7), real)
    mixed = torch.lerp(means(flat, into, real), flat, scene.method.own)
    rows = torch.where(centre[..., None], mixed, flat).view(tokens.shape)
    return rows[kept | centre.view(kept.shape)].view(items, scene.keep, width)


def _windows(same: Tensor) -> tuple[Tensor, Tensor]:
    """[I, F] the first frame of each frame's window, and [I, F, n] what is still there; same: [I, F - 1, n].

    The cut into windows that merges most, by dynamic programming over the last frame.
    """
    items, steps, size = same.shape
    best_of = [torch.zeros(items, dtype=torch.long)]
    starts: list[Tensor] = []
    for end in range(steps + 1):
        still, gains = torch.ones(items, size, dtype=torch.bool), []
        for start in range(end, -1, -1):
            if start < end:
                still = still & same[:, start]
            gains.append(best_of[start] + (end - start) * still.sum(1) * (end > start))
        gain, back = torch.stack(gains, 1).max(1)
        best_of.append(gain)
        starts.append(end - back)
    first = torch.zeros(items, steps + 1, dtype=torch.long)
    for item in range(items):
        end = steps
        while end >= 0:
            start = int(starts[end][item])
            first[item, start : end + 1] = start
            end = start - 1
    window = first[:, :, None] == first[:, None]
    joined = (first[:, 1:] == first[:, :-1])[..., None]
    changes = torch.nn.functional.pad((joined & ~same).long(), (0, 0, 1, 0))
    still = (window.float() @ changes.float() == 0) & (window.sum(2) > 1)[..., None]
    return first, still
