"""Neighbours on tiles and the choice by two scores, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vtc.method.groups import Parts
from vtc.methods.hiprune.neighbours import Border, hierarchical, neighbours, tile_places
from vtc.ops.select import in_groups
from vtc.testing.plain import OpCase, Size


def tiles_of(group: Tensor, mask: Tensor, item: int) -> Iterator[tuple[int, list[int]]]:
    """(tile, positions of its tokens) of one item."""
    numbers, there = group[item].tolist(), mask[item].tolist()
    for tile in sorted({g for g, real in zip(numbers, there, strict=True) if real}):
        yield tile, [p for p, g in enumerate(numbers) if g == tile and there[p]]


def plain_tile_places(group: Tensor, row: Tensor, col: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the different rows and columns of every tile."""
    place, width, size = (torch.zeros_like(group) for _ in range(3))
    for item in range(len(group)):
        for _, members in tiles_of(group, mask, item):
            rows = sorted({row[item, p].item() for p in members})
            cols = sorted({col[item, p].item() for p in members})
            for p in members:
                place[item, p] = rows.index(row[item, p].item()) * len(cols) + cols.index(col[item, p].item())
                width[item, p], size[item, p] = len(cols), len(rows) * len(cols)
    return place, width, size


def plain_neighbours(
    group: Tensor, place: Tensor, width: Tensor, size: Tensor, mask: Tensor, border: Border = "clamp"
) -> Tensor:
    """Look the four places of every token up in its tile."""
    near = torch.arange(group.shape[1])[None, :, None].repeat(len(group), 1, 4)
    for item in range(len(group)):
        for _, members in tiles_of(group, mask, item):
            where = {int(place[item, p]): p for p in members}
            for p in members:
                here, wide, last = int(place[item, p]), int(width[item, p]), int(size[item, p]) - 1
                targets = [here - 1, here + 1, here - wide, here + wide]
                if border == "clamp":
                    targets = [max(0, min(last, target)) for target in targets]
                else:
                    if here % wide == 0:
                        targets[0] = here
                    if here % wide == wide - 1:
                        targets[1] = here
                for side, target in enumerate(targets):
                    near[item, p, side] = where.get(target, p)
    return near


def plain_hierarchical(
    object_scores: Tensor,
    deep_scores: Tensor,
    near: Tensor,
    tiles: Parts,
    share: Tensor,
    anchors: Tensor,
    penalty: Tensor | None = None,
) -> Tensor:
    """Anchors, buffers, registers, tile by tile."""
    kept = torch.zeros(near.shape[:2], dtype=torch.bool)
    for item in range(len(near)):
        middle, deep = object_scores[item].tolist(), deep_scores[item].tolist()
        for tile in range(item * len(tiles.mask) // len(near), (item + 1) * len(tiles.mask) // len(near)):
            assert tiles.place is not None
            members = tiles.place[tile][tiles.mask[tile]].tolist()
            budget = int(share[tile])
            ranked = sorted(members, key=lambda p: (-middle[p], p))
            first = ranked[: int(anchors[tile])]
            buffers = {int(q) for p in first for q in near[item, p]} - set(first)
            union = [*first, *sorted(buffers, key=lambda p: (-middle[p], p))][:budget]
            if penalty is None:
                rest = sorted(set(members) - set(union), key=lambda p: (-deep[p], p))
            else:
                less = float(penalty[item, 0])
                lowered = {p: (torch.tensor(deep[p]) - less * (p in union)).item() for p in members}
                rest = sorted(members, key=lambda p: (-lowered[p], p))
            kept[item, [*union, *rest[: budget - len(union)]]] = True
    return kept


def layout(size: Size, seed: int = 0) -> dict[str, Tensor]:
    """group, row, col, mask of items made of tiles of several sizes, their tokens interleaved row by row."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [[(3, 5), (1, 1), (2, 3)], [(4, 4)], [(1, 7), (5, 2)]]
    if size == "large":
        shapes = [[(24, 24)] * 9] * 18
    items = []
    for tiles in shapes:
        tokens = [(g, 2 * r + 0.5, 2 * c + 0.5) for g, (h, w) in enumerate(tiles) for r in range(h) for c in range(w)]
        tokens.sort(key=lambda token: (token[1], token[0], token[2]))
        items.append(torch.tensor(tokens))
    padded = torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)
    shift = torch.rand(len(items), 1, 2, generator=generator)
    group, places = padded[..., 0].long(), padded[..., 1:] + shift
    return {"group": group, "row": places[..., 0], "col": places[..., 1], "mask": group >= 0}


def make_places(size: Size) -> dict[str, Any]:
    return layout(size)


def make_neighbours(size: Size) -> dict[str, Any]:
    """Some tokens are missing."""
    tokens = layout(size)
    place, width, places = tile_places(**tokens)
    draw = torch.rand(tokens["mask"].shape, generator=torch.Generator().manual_seed(1))
    missing = {"mask": tokens["mask"] & (draw > 0.2), "group": tokens["group"]}
    return {**missing, "place": place, "width": width, "size": places, "border": "clamp"}


def make_hierarchical(size: Size) -> dict[str, Any]:
    tokens = layout(size)
    group, mask = tokens["group"], tokens["mask"]
    near = neighbours(group, *tile_places(**tokens), mask)
    generator = torch.Generator().manual_seed(2)
    tiles = int(group.max()) + 1
    count = torch.stack([(group == tile).sum(1) for tile in range(tiles)], dim=1)
    share = count.flatten() // 2
    place, real = in_groups(group, tiles, int(count.max()), mask)
    return {
        "object_scores": torch.rand(group.shape, generator=generator),
        "deep_scores": torch.rand(group.shape, generator=generator).mul(8).round(),  # ties
        "near": near,
        "tiles": Parts(real.flatten(0, 1), place.flatten(0, 1), mask),
        "share": share,
        "anchors": share // 4,
    }


CASES = (
    OpCase(tile_places, plain_tile_places, make_places),
    OpCase(neighbours, plain_neighbours, make_neighbours),
    OpCase(hierarchical, plain_hierarchical, make_hierarchical),
)
