"""Windows of neighbouring tokens, one window and one pair of members at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.methods.mustdrop.windows import (
    APART,
    merge_windows,
    merged_first,
    raster_windows,
    window_members,
    window_similarity,
)
from vtc.testing.plain import OpCase, Size


def plain_raster_windows(
    regions: Sequence[tuple[int, int, int]], window: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Cut every frame into windows and look up which one a token lies in."""
    numbers: list[int] = []
    count = 0
    for frames, height, width in regions:
        for _ in range(frames):
            corners = [
                (row, col)
                for row in range(0, height - window[0] + 1, window[0])
                for col in range(0, width - window[1] + 1, window[1])
            ]
            for row in range(height):
                for col in range(width):
                    inside = [
                        count + number
                        for number, (top, left) in enumerate(corners)
                        if top <= row < top + window[0] and left <= col < left + window[1]
                    ]
                    numbers += inside or [-1]
            count += len(corners)
    return torch.tensor(numbers, device=device, dtype=torch.long)


def plain_window_members(window: Tensor, windows: int, size: int) -> tuple[Tensor, Tensor]:
    """Collect each window's members; the lists of incomplete ones are as the op leaves them."""
    members, whole = window_members(window, windows, size)
    members, whole = members.clone(), torch.zeros_like(whole)
    for item, numbers in enumerate(window.tolist()):
        for each in range(windows):
            found = [token for token, number in enumerate(numbers) if number == each]
            if len(found) == size:
                members[item, each] = torch.tensor(found)
                whole[item, each] = True
    return members, whole


def plain_window_similarity(x: Tensor, members: Tensor, whole: Tensor) -> Tensor:
    """S_w = sum of cos(x_u, x_v) over u != v, divided by k (k - 1)."""
    similarity = torch.full(whole.shape, APART)
    for item, rows in enumerate(x.double()):
        for each in range(whole.shape[1]):
            if not whole[item, each]:
                continue
            tokens = [rows[place] for place in members[item, each].tolist()]
            pairs = [
                float(u @ v) / (max(float(u.norm()), 1e-8) * max(float(v.norm()), 1e-8))
                for a, u in enumerate(tokens)
                for b, v in enumerate(tokens)
                if a != b
            ]
            similarity[item, each] = sum(pairs) / len(pairs)
    return similarity


def plain_merge_windows(x: Tensor, members: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put the mean of a chosen window on its first member and strike out the others."""
    tokens, kept = x.clone(), torch.ones(x.shape[:2], dtype=torch.bool)
    into = torch.full(x.shape[:2], -1)
    for item in range(len(x)):
        for each in range(chosen.shape[1]):
            if chosen[item, each]:
                places: list[int] = members[item, each].tolist()
                total = torch.zeros(x.shape[2])
                for place in places:
                    total = total + x[item, place].float()
                    into[item, place] = places[0]
                    kept[item, place] = place == places[0]
                tokens[item, places[0]] = (total / len(places)).to(x.dtype)
    return tokens, kept, into


def plain_merged_first(kept: Tensor, members: Tensor, chosen: Tensor, similarity: Tensor) -> Tensor:
    """Merged tokens by falling similarity, other kept ones, dropped ones; matched to kept places, then dropped ones."""
    source = torch.empty(kept.shape, dtype=torch.long)
    for item, row in enumerate(kept.tolist()):
        picked = [each for each in range(chosen.shape[1]) if chosen[item, each]]
        picked.sort(key=lambda each: (-float(similarity[item, each]), each))
        merged: list[int] = [int(members[item, each, 0]) for each in picked]
        others = [token for token, left in enumerate(row) if left and token not in merged]
        dropped = [token for token, left in enumerate(row) if not left]
        places = [*(place for place, left in enumerate(row) if left), *dropped]
        for place, token in zip(places, [*merged, *others, *dropped], strict=True):
            source[item, place] = token
    return source


def make_regions(size: Size) -> dict[str, Any]:
    if size == "large":
        return {"regions": [(64, 24, 24), (1, 72, 48)], "window": (3, 3)}
    return {"regions": [(2, 7, 5), (1, 2, 9), (3, 3, 3)], "window": (3, 2)}


def make_members(size: Size) -> dict[str, Any]:
    """Items of several sizes, some of whose tokens are gone."""
    shapes = [(24, 24)] * 64 if size == "large" else [(7, 9), (3, 4), (2, 2), (6, 6)]
    window = (3, 3) if size == "large" else (2, 3)
    numbers = [raster_windows([(1, *shape)], window) for shape in shapes]
    padded = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=-1)
    draw = torch.rand(padded.shape, generator=torch.Generator().manual_seed(0))
    return {"window": padded.masked_fill(draw < 0.03, -1), "windows": int(padded.max()) + 1, "size": math.prod(window)}


def make_similarity(size: Size) -> dict[str, Any]:
    members, whole = window_members(**make_members(size))
    given = make_members(size)["window"]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*given.shape, 32 if size == "large" else 7, generator=generator) + 1
    x[0, 0] = 0.0
    return {"x": x, "members": members, "whole": whole}


def make_merge(size: Size) -> dict[str, Any]:
    given = make_similarity(size)
    draw = torch.rand(given["whole"].shape, generator=torch.Generator().manual_seed(2))
    return {"x": given["x"], "members": given["members"], "chosen": given["whole"] & (draw < 0.6)}


def make_order(size: Size) -> dict[str, Any]:
    given = make_merge(size)
    _, kept, _ = merge_windows(**given)
    similarity = window_similarity(**make_similarity(size))
    return {
        "kept": kept & (make_members(size)["window"] >= -1),
        "members": given["members"],
        "chosen": given["chosen"],
        "similarity": similarity.mul(4).round(),  # ties
    }


CASES = (
    OpCase(raster_windows, plain_raster_windows, make_regions),
    OpCase(window_members, plain_window_members, make_members),
    OpCase(window_similarity, plain_window_similarity, make_similarity, 1e-6),
    OpCase(merge_windows, plain_merge_windows, make_merge, 1e-6),
    OpCase(merged_first, plain_merged_first, make_order),
)
