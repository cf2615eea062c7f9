"""GlobalCom2's allocation and ranking, one crop and one token at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtc.methods.globalcom2.crops import (
    blend,
    cell_sums,
    crop_ratios,
    exact_shares,
    floored_shares,
    group_sums,
    released_order,
    standardise,
    stretch,
    unlike_mean,
)
from vtc.testing.plain import OpCase, Size


def plain_cell_sums(overview: Tensor, tiling: tuple[int, int]) -> Tensor:
    """S_c = sum of z over the patches whose cell is c."""
    count, height, width = overview.shape
    h, w = tiling
    sums = torch.zeros(count, h * w, dtype=torch.float64)
    for item, scores in enumerate(overview.double().tolist()):
        for i in range(height):
            for j in range(width):
                row, column = min(i // max(1, height // h), h - 1), min(j // max(1, width // w), w - 1)
                sums[item, row * w + column] += scores[i][j]
    return sums


def plain_crop_ratios(sums: Tensor, guided: Tensor, ratio: Tensor, tau: float) -> Tensor:
    """r_c = min(1, R (1 + sigma_c - mean sigma))."""
    found = torch.zeros(sums.shape, dtype=torch.float64)
    for item, (row, marks, r) in enumerate(zip(sums.tolist(), guided.tolist(), ratio.tolist(), strict=True)):
        found[item] = min(1.0, r)
        crops = [c for c, mark in enumerate(marks) if mark]
        power = {c: math.exp((row[c] - max(row[d] for d in crops)) / tau) for c in crops}
        sigma = {c: power[c] / (sum(power.values()) + 1e-8) for c in crops}
        for c in crops:
            found[item, c] = min(1.0, r * (1 + sigma[c] - sum(sigma.values()) / len(crops)))
    return found


def plain_floored_shares(ratios: Tensor, sizes: Tensor, first: Tensor) -> Tensor:
    """k_c = floor(n_c r_c), one at least for the first."""
    found = torch.zeros_like(sizes)
    for item in range(len(sizes)):
        for c, (r, n) in enumerate(zip(ratios[item].tolist(), sizes[item].tolist(), strict=True)):
            found[item, c] = max(math.floor(n * r), min(1, n) if c == int(first[item]) else 0)
    return found


def plain_exact_shares(ratios: Tensor, sizes: Tensor, total: Tensor, fixed: Tensor) -> Tensor:
    """Fixed crops first; the others scaled, cut at their size, and scaled again until none is above it."""
    found = torch.zeros_like(sizes)
    for item in range(len(sizes)):
        r, n, k = ratios[item].tolist(), sizes[item].tolist(), int(total[item])
        quota = {c: min(max(n[c] * r[c], 1), n[c], k) if fixed[item, c] else 0.0 for c in range(len(n))}
        rest = k - sum(quota.values())
        free = [c for c in range(len(n)) if not fixed[item, c] and n[c]]
        full: list[int] = []
        while free:
            scale = (rest - sum(n[c] for c in full)) / max(1e-12, sum(n[c] * r[c] for c in free))
            above = [c for c in free if scale * r[c] > 1]
            if not above:
                break
            full, free = full + above, [c for c in free if c not in above]
        quota |= {c: float(n[c]) for c in full} | {c: scale * n[c] * r[c] for c in free}
        quota = {c: round(value * 2**20) / 2**20 for c, value in quota.items()}
        share = {c: math.floor(value) for c, value in quota.items()}
        order = sorted(quota, key=lambda c: (share[c] - quota[c], c))
        for c in order[: k - sum(share.values())]:
            share[c] += 1
        found[item] = torch.tensor([share[c] for c in range(len(n))])
    return found


def plain_stretch(overview: Tensor, size: tuple[int, int]) -> Tensor:
    """Weighted mean of the four patches around every sample, sample centres at (i + 1/2) G / size - 1/2."""
    count, height, width = overview.shape
    found = torch.zeros(count, *size)

    def around(place: int, new: int, old: int) -> tuple[int, int, float]:
        at = max(0.0, (place + 0.5) * old / new - 0.5)
        low = min(int(at), old - 1)
        return low, min(low + 1, old - 1), at - low

    for item, scores in enumerate(overview.double().tolist()):
        for i in range(size[0]):
            top, bottom, y = around(i, size[0], height)
            for j in range(size[1]):
                left, right, x = around(j, size[1], width)
                upper = scores[top][left] * (1 - x) + scores[top][right] * x
                lower = scores[bottom][left] * (1 - x) + scores[bottom][right] * x
                found[item, i, j] = upper * (1 - y) + lower * y
    return found


def members(group: Tensor, mask: Tensor, groups: int) -> list[list[list[int]]]:
    """The tokens of every crop of every item."""
    found: list[list[list[int]]] = []
    for numbers, there in zip(group.tolist(), mask.tolist(), strict=True):
        found.append([[] for _ in range(groups)])
        for j, (number, real) in enumerate(zip(numbers, there, strict=True)):
            if real:
                found[-1][number].append(j)
    return found


def plain_blend(local: Tensor, overall: Tensor, group: Tensor, groups: int, mask: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) l / |l| + alpha g / |g|."""
    found = torch.zeros(local.shape)
    for item, crops in enumerate(members(group, mask, groups)):
        here, over = local[item].tolist(), overall[item].tolist()
        for crop in crops:
            norm_l = max(1e-12, math.sqrt(sum(here[j] ** 2 for j in crop)))
            norm_g = max(1e-12, math.sqrt(sum(over[j] ** 2 for j in crop)))
            for j in crop:
                found[item, j] = (1 - alpha) * here[j] / norm_l + alpha * over[j] / norm_g
    return found


def plain_released_order(
    kept: Tensor, scores: Tensor, group: Tensor, tiling: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Overview by falling score, then row by row whatever a crop's number inside it puts there, a newline each."""
    (h, w), (height, width) = tiling, grid
    tokens = kept.shape[1]
    found = torch.zeros(len(kept), tokens + h * height, dtype=torch.long)
    crops_of = members(group, torch.ones_like(kept), h * w + 1)
    for item, (row, marks) in enumerate(zip(scores.tolist(), kept.tolist(), strict=True)):
        crops = crops_of[item]
        order = [j for j in sorted(crops[0], key=lambda j: (-row[j], j)) if marks[j]]
        lines: dict[int, list[tuple[int, int]]] = {line: [] for line in range(h * height)}
        for c, crop in enumerate(crops[1:]):
            for number, j in enumerate(crop):
                if marks[j]:
                    line = c // w * height + number // width
                    lines[line].append((c % w * width + number % width, j))
        for line, there in lines.items():
            order += [*(j for _, j in sorted(there)), tokens + line]
        found[item] = torch.tensor(order + [j for j in range(tokens) if not marks[j]])
    return found


def plain_standardise(values: Tensor, group: Tensor, groups: int, mask: Tensor) -> Tensor:
    """(x - mean) / deviation."""
    found = torch.zeros(values.shape)
    for item, crops in enumerate(members(group, mask, groups)):
        row = values[item].tolist()
        for crop in crops:
            mean = sum(row[j] for j in crop) / max(1, len(crop))
            deviation = math.sqrt(sum((row[j] - mean) ** 2 for j in crop) / max(1, len(crop)))
            for j in crop:
                found[item, j] = (row[j] - mean) / max(1e-12, deviation)
    return found


def plain_unlike_mean(features: Tensor, group: Tensor, groups: int, mask: Tensor, chunk: int = 0) -> Tensor:
    """-x . g / (|x| |g|), g the mean of the crop."""
    found = torch.zeros(features.shape[:2])
    for item, crops in enumerate(members(group, mask, groups)):
        for crop in crops:
            if crop:
                mean = features[item, crop].double().mean(0)
                for j in crop:
                    x = features[item, j].double()
                    found[item, j] = -torch.dot(x, mean) / (x.norm() * mean.norm()).clamp(min=1e-12)
    return found


def plain_group_sums(values: Tensor, group: Tensor, groups: int, mask: Tensor) -> Tensor:
    """Sum of every crop."""
    found = torch.zeros(len(values), groups, dtype=torch.float64)
    for item, crops in enumerate(members(group, mask, groups)):
        row = values[item].tolist()
        for c, crop in enumerate(crops):
            found[item, c] = sum(row[j] for j in crop)
    return found


# --- arguments
def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(size: Size, seed: int = 0) -> dict[str, Any]:
    """group, groups and mask of items with 5 crops, of which one is empty in places, and padding."""
    items, length = (3, 23) if size == "small" else (128, 2928)
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 5, (items, length), generator=generator).sort(dim=1).values
    group[0] = group[0].clamp(max=3)
    mask = torch.arange(length) < torch.tensor([length - i % 3 for i in range(items)])[:, None]
    return {"group": torch.where(mask, group, -1), "groups": 5, "mask": mask}


def scores_of(size: Size, seed: int = 0) -> Tensor:
    """Scores with ties."""
    return (random(*tokens(size)["mask"].shape, seed=seed) * 4).round() / 4


def shares_of(size: Size) -> dict[str, Any]:
    """ratios and sizes."""
    items, crops = (5, 5) if size == "small" else (4000, 10)
    generator = torch.Generator().manual_seed(3)
    ratios = torch.rand(items, crops, generator=generator, dtype=torch.float64).clamp(min=0.1, max=0.9)
    sizes = torch.randint(0, 577, (items, crops), generator=generator)
    sizes[:, 0] = 576
    return {"ratios": ratios, "sizes": sizes}


def exact_arguments(size: Size) -> dict[str, Any]:
    given = shares_of(size)
    part = torch.linspace(0, 1, len(given["sizes"]), dtype=torch.float64)
    given["ratios"][:, 0] = part  # the overview's ratio is the whole image's
    total = (part * given["sizes"].sum(1)).round().long()
    fixed = torch.zeros_like(given["sizes"], dtype=torch.bool)
    fixed[1:, 0] = True
    return {**given, "total": total, "fixed": fixed}


def ratio_arguments(size: Size) -> dict[str, Any]:
    items = 4 if size == "small" else 8000
    guided = torch.ones(items, 7, dtype=torch.bool)
    guided[:, 0], guided[1, 4:] = False, False
    return {"sums": random(items, 7) * 30, "guided": guided, "ratio": torch.linspace(0, 1, items), "tau": 10.0}


def order_arguments(size: Size) -> dict[str, Any]:
    (h, w), (height, width) = ((2, 2), (3, 4)) if size == "small" else ((3, 3), (24, 24))
    crop = height * width
    group = torch.repeat_interleave(torch.arange(h * w + 1), torch.tensor([crop, *[crop - width] * (h * w)]))
    items = 2 if size == "small" else 32
    kept, scores = random(items, len(group), seed=1) > 0.5, (random(items, len(group)) * 4).round()
    return {"kept": kept, "scores": scores, "group": group.expand(items, -1), "tiling": (h, w), "grid": (height, width)}


def feature_arguments(size: Size) -> dict[str, Any]:
    given = {name: x[:16] if isinstance(x, Tensor) else x for name, x in tokens(size).items()}
    shape, width, chunk = given["mask"].shape, *((6, 5) if size == "small" else (64, 4096))
    return {"features": random(*shape, width), **given, "chunk": chunk}


CASES = (
    OpCase(
        cell_sums,
        plain_cell_sums,
        lambda size: {"overview": random(2, 7, 5) if size == "small" else random(256, 24, 24), "tiling": (2, 3)},
        1e-12,
    ),
    OpCase(crop_ratios, plain_crop_ratios, ratio_arguments, 1e-7),
    OpCase(
        floored_shares,
        plain_floored_shares,
        lambda size: {**shares_of(size), "first": torch.arange(len(shares_of(size)["sizes"])) % 5},
    ),
    OpCase(exact_shares, plain_exact_shares, exact_arguments),
    OpCase(
        stretch,
        plain_stretch,
        lambda size: (
            {"overview": random(2, 5, 4), "size": (11, 3)}
            if size == "small"
            else {"overview": random(32, 24, 24), "size": (48, 72)}
        ),
        1e-5,
    ),
    OpCase(
        blend,
        plain_blend,
        lambda size: {"local": scores_of(size), "overall": scores_of(size, 1), **tokens(size), "alpha": 0.3},
        1e-6,
    ),
    OpCase(released_order, plain_released_order, order_arguments),
    OpCase(standardise, plain_standardise, lambda size: {"values": scores_of(size), **tokens(size)}, 1e-6),
    OpCase(
        unlike_mean,
        plain_unlike_mean,
        feature_arguments,
        1e-5,
    ),
    OpCase(group_sums, plain_group_sums, lambda size: {"values": scores_of(size), **tokens(size)}, 1e-12),
)
