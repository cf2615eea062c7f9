"""References for `vtc.ops.frames`: places of frames looked up one token at a time, shares found by halving."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from vtc.ops.frames import earlier, latest, likeness, places, quotas, roots, segments, windows
from vtc.testing.plain import OpCase, Size


def plain_places(row: Tensor, col: Tensor, mask: Tensor) -> Tensor:
    """Number the different places of every item in raster order; what is no token behind them."""
    found = torch.zeros_like(mask, dtype=torch.long)
    for item, real in enumerate(mask.tolist()):
        spots = [(not there, *spot) for there, *spot in zip(real, row[item].tolist(), col[item].tolist(), strict=True)]
        different = sorted(set(spots))
        found[item] = torch.tensor([different.index(spot) for spot in spots])
    return found


def plain_earlier(frame: Tensor, place: Tensor, lag: Tensor, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Look every token's frame and place up in a dictionary."""
    found = torch.full_like(frame, -1)
    for item, real in enumerate(mask.tolist()):
        tokens = [token for token, there in enumerate(real) if there]
        where = {(int(frame[item, token]), int(place[item, token])): token for token in tokens}
        for token in tokens:
            spot = int(frame[item, token] - lag[item, token]), int(place[item, token])
            found[item, token] = where.get(spot, -1)
    return found


def plain_latest(frame: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Remember the last token of each place, frame after frame."""
    found = torch.full_like(frame, -1)
    for item, real in enumerate(mask.tolist()):
        last: dict[int, int] = {}
        tokens = [token for token, there in enumerate(real) if there]
        for token in sorted(tokens, key=lambda token: int(frame[item, token])):
            spot = int(place[item, token])
            found[item, token] = last.get(spot, -1)
            last[spot] = token
    return found


def plain_likeness(x: Tensor, other: Tensor) -> Tensor:
    """One pair after the other."""
    found = torch.full(other.shape, -math.inf)
    for item, row in enumerate(other.tolist()):
        for token, partner in enumerate(row):
            if partner >= 0:
                a, b = x[item, token].double(), x[item, partner].double()
                found[item, token] = float(a @ b / (a.norm() * b.norm()))
    return found


def plain_cuts(features: Tensor, count: int, threshold: float) -> list[list[int]]:
    """The frames of each segment of one video."""
    x = features.double()
    alike = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.pairwise(x)]
    smallest = sorted(range(len(alike)), key=lambda f: (round(alike[f], 7), f))[: count - 1]
    found: list[list[int]] = [[]]
    for frame in range(len(x)):
        found[-1].append(frame)
        if frame < len(alike) and (alike[frame] < threshold or frame in smallest):
            found.append([])
    return found


def plain_segments(features: Tensor, real: Tensor, count: int, threshold: float) -> tuple[Tensor, Tensor]:
    """One video after the other; what is no frame lies in the last segment, alone."""
    segment, behind = torch.zeros_like(real, dtype=torch.long), torch.zeros_like(real, dtype=torch.long)
    for item, length in enumerate(real.sum(1).tolist()):
        found = plain_cuts(features[item, :length], count, threshold)
        segment[item, length:] = len(found) - 1
        for number, members in enumerate(found):
            segment[item, members] = number
            behind[item, members] = torch.arange(len(members)).flip(0)
    return segment, behind


def plain_roots(parent: Tensor, depth: int) -> Tensor:
    """Walk up, one step at a time."""
    found = parent.clone()
    for item, row in enumerate(parent.tolist()):
        for token, at in enumerate(row):
            while row[at] != at:
                at = row[at]
            found[item, token] = at
    return found


def plain_partition(same: list[list[bool]]) -> list[list[int]]:
    """The frames of each window of one video: the best of the front's partitions, the shortest last window first."""
    best: list[tuple[int, list[list[int]]]] = [(0, [])]
    for end in range(len(same)):
        found: tuple[int, list[list[int]]] = (-1, [])
        for start in reversed(range(end + 1)):
            still = sum(all(column) for column in zip(*same[start + 1 : end + 1], strict=True)) if end > start else 0
            saved = best[start][0] + (end - start) * still
            if saved > found[0]:
                found = saved, [*best[start][1], list(range(start, end + 1))]
        best.append(found)
    return best[-1][1]


def plain_windows(same: Tensor) -> tuple[Tensor, Tensor]:
    """One video after the other."""
    first, still = torch.zeros(same.shape[:2], dtype=torch.long), torch.zeros_like(same)
    for item, rows in enumerate(same.tolist()):
        for window in plain_partition(rows):
            first[item, window] = window[0]
            if len(window) > 1:
                still[item, window] = same[item, window[1:]].all(0)
    return first, still


def plain_shares(weight: list[float], keep: int, size: list[int], least: int = 0) -> list[int]:
    """The factor by halving, then largest remainders."""
    low = [min(least, n) for n in size]
    if sum(low) > keep:
        low = [0] * len(size)
    high = [max(n if w > 0 else 0, lowest) for w, n, lowest in zip(weight, size, low, strict=True)]

    def shares(factor: float) -> list[float]:
        columns = zip(weight, low, high, strict=True)
        return [min(float(most), max(float(lowest), factor * w)) for w, lowest, most in columns]

    start, end = 0.0, max([most / w for w, most in zip(weight, high, strict=True) if w > 0], default=0.0)
    for _ in range(200):
        middle = (start + end) / 2
        start, end = (middle, end) if sum(shares(middle)) <= keep else (start, middle)
    exact = shares(end)
    whole = [math.floor(each + 1e-9) for each in exact]
    order = sorted(range(len(size)), key=lambda g: (-round(exact[g] - whole[g], 7), g))
    for group in [g for g in order if whole[g] < high[g]][: keep - sum(whole)]:
        whole[group] += 1
    return whole


def plain_quotas(weight: Tensor, keep: Tensor, size: Tensor, least: int = 0) -> Tensor:
    """One row after the other."""
    rows = zip(weight.double().tolist(), keep.tolist(), size.tolist(), strict=True)
    return torch.tensor([plain_shares(*row, least) for row in rows])


def _clips(size: Size) -> dict[str, Tensor]:
    """frame, row, col, mask of clips from which some tokens are missing."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 2, 3), (2, 3, 3), (1, 4, 5)] if size == "small" else [(32, 14, 14)] * 4
    clips = [
        torch.tensor([(f, r + 0.5, 2 * c) for f in range(frames) for r in range(rows) for c in range(columns)])
        for frames, rows, columns in shapes
    ]
    padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=-1)
    there = (padded[..., 0] >= 0) & (torch.rand(padded.shape[:2], generator=generator) < 0.8)
    frame = torch.where(there, padded[..., 0].long(), 0)
    return {"frame": frame, "row": padded[..., 1], "col": padded[..., 2], "mask": there}


def _placed(size: Size) -> dict[str, Any]:
    clip = _clips(size)
    place = places(clip["row"], clip["col"], clip["mask"])
    lag = torch.randint(1, 3, place.shape, generator=torch.Generator().manual_seed(2))
    shape = int(clip["frame"].max()) + 1, int(place[clip["mask"]].max()) + 1
    return {"frame": clip["frame"], "place": place, "lag": lag, "mask": clip["mask"], "shape": shape}


def _pairs(size: Size) -> dict[str, Any]:
    other = earlier(**_placed(size))
    return {"x": torch.randn(*other.shape, 8, generator=torch.Generator().manual_seed(3)), "other": other}


def _weights(size: Size) -> dict[str, Any]:
    """Groups of size 0, of weight 0 and of equal weights; too little for the least, all there is, more than that."""
    generator = torch.Generator().manual_seed(4)
    rows, groups = (12, 5) if size == "small" else (64, 128)
    weight = torch.randint(0, 6, (rows, groups), generator=generator).double() / 3
    sizes = torch.randint(0, 9, (rows, groups), generator=generator)
    spent = torch.where(weight > 0, sizes, sizes.clamp(max=1)).sum(1)
    keep = (spent * torch.linspace(0, 1, rows)).long()
    return {"weight": weight, "keep": keep, "size": sizes, "least": 1}


def _features(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    items, frames = (4, 9) if size == "small" else (8, 128)
    steps = torch.randn(items, frames, 6, generator=generator) * torch.rand(items, frames, 1, generator=generator)
    features = 1 + steps.cumsum(1) / 2
    features[0, 3:6] = features[0, 2]  # still
    real = torch.arange(frames) < torch.tensor([frames, 1, frames - 2, 4]).repeat(items // 4)[:, None]
    return {"features": features, "real": real, "count": 3, "threshold": 0.9}


def _same(size: Size) -> dict[str, Any]:
    """Places that change seldom and often, frames that are cuts, one video of which nothing is still."""
    generator = torch.Generator().manual_seed(6)
    items, frames, width = (4, 9, 5) if size == "small" else (4, 64, 196)
    rate = torch.rand(items, frames, 1, generator=generator).sqrt()
    same = torch.rand(items, frames, width, generator=generator) < rate
    same[:, 0], same[1, 4:], same[3] = False, False, False
    return {"same": same}


def _chains(size: Size) -> dict[str, Any]:
    """Parents as long chains as there are frames, and short ones."""
    other = latest(**{name: _placed(size)[name] for name in ("frame", "place", "mask")})
    short = torch.rand(other.shape, generator=torch.Generator().manual_seed(7)) < torch.arange(len(other))[:, None] / 8
    own = torch.arange(other.shape[1]).expand_as(other)
    return {"parent": torch.where((other < 0) | short, own, other), "depth": _placed(size)["shape"][0]}


CASES = (
    OpCase(roots, plain_roots, _chains),
    OpCase(windows, plain_windows, _same),
    OpCase(segments, plain_segments, _features),
    OpCase(places, plain_places, lambda size: {name: _clips(size)[name] for name in ("row", "col", "mask")}),
    OpCase(earlier, plain_earlier, _placed),
    OpCase(latest, plain_latest, lambda size: {name: _placed(size)[name] for name in ("frame", "place", "mask")}),
    OpCase(likeness, plain_likeness, _pairs, 1e-6),
    OpCase(quotas, plain_quotas, _weights),
)
