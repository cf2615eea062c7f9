"""Bipartite merging one group, one pair and one mean at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtc.ops import merge as ops
from vtc.ops.merge import Merge
from vtc.testing.plain import OpCase, Size


def cosine(a: Tensor, b: Tensor) -> float:
    """a . b / (|a| |b|), 0 for a zero vector."""
    lengths = float(a.norm()) * float(b.norm())
    return float(a @ b) / lengths if lengths else 0.0


def best_match(metric: Tensor, counts: Tensor, *, protected: int = 0) -> tuple[Tensor, Tensor]:
    """Token 2i proposes the odd token it is most similar to, the first among equals."""
    pairs = (metric.shape[1] + 1) // 2
    partner = torch.zeros(len(metric), pairs, dtype=torch.long)
    similarity = torch.full((len(metric), pairs), -math.inf)
    for g, count in enumerate(counts.tolist()):
        for i in range(pairs):
            values = [cosine(metric[g, 2 * i], metric[g, j]) for j in range(1, count, 2)]
            if values:
                partner[g, i] = values.index(max(values))
                if protected <= 2 * i < count:
                    similarity[g, i] = max(values)
            elif metric.shape[1] < 2:
                partner[g, i] = i
    return partner, similarity


def decide(metric: Tensor, merged: int, order: str, protected: int) -> tuple[list[int], list[int]]:
    """Target of every token of one group [t, C] and anchor of every row, by the steps of the algorithm."""
    count = len(metric)
    if merged == 0:
        return list(range(count)), list(range(count))
    proposals: list[tuple[float, int, int | None]] = []
    for i in range(0, count, 2):
        values = [cosine(metric[i], metric[j]) for j in range(1, count, 2)]
        if i < protected or not values:
            proposals.append((-math.inf, i, None))
        else:
            proposals.append((max(values), i, 2 * values.index(max(values)) + 1))
    ranked = sorted(proposals, key=lambda proposal: (-proposal[0], proposal[1]))
    alone = [i for _, i, _ in ranked[merged:]]
    if order == "index":
        alone = sorted(alone)
    rows = [*alone, *range(1, count, 2)]
    place = {token: row for row, token in enumerate(rows)}
    place |= {i: place[j] for _, i, j in ranked[:merged] if j is not None}
    return [place[token] for token in range(count)], rows


def merge_step(
    metric: Tensor, counts: Sequence[int], merged: Sequence[int], *, order: str = "similarity", protected: int = 0
) -> tuple[Tensor, Tensor]:
    width = max(n - r for n, r in zip(counts, merged, strict=True))
    target = torch.full(metric.shape[:2], width)
    anchor = torch.zeros(len(metric), width, dtype=torch.long)
    for g, (count, gone) in enumerate(zip(counts, merged, strict=True)):
        targets, rows = decide(metric[g, :count], gone, order, protected)
        target[g, :count], anchor[g, : count - gone] = torch.tensor(targets), torch.tensor(rows)
    return target, anchor


def bipartite_merge(
    metric: Tensor,
    counts: Sequence[int],
    plans: Sequence[Sequence[int]],
    *,
    size: Tensor | None = None,
    order: str = "similarity",
    protected: int = 0,
) -> Merge:
    """Rows are lists of (share, input token); a step joins the lists of what it merges."""
    done = []
    for g, (count, plan) in enumerate(zip(counts, plans, strict=True)):
        rows = [[(1.0, token)] for token in range(count)]
        anchors, values = list(range(count)), metric[g, :count].double()
        sizes = [1.0] * count if size is None else size[g, :count].tolist()
        for wanted in plan:
            gone = max(0, min(wanted, (len(rows) - protected) // 2))
            targets, stands = decide(values, gone, order, protected)
            joined = [[old for old, row in enumerate(targets) if row == new] for new in range(len(stands))]
            parts = [[sizes[old] if size is not None else 1.0 for old in group] for group in joined]
            shares = [[part / sum(row) for part in row] for row in parts]
            pairs = [list(zip(*each, strict=True)) for each in zip(shares, joined, strict=True)]
            rows = [[(s * share, token) for s, old in row for share, token in rows[old]] for row in pairs]
            values = torch.stack([torch.stack([s * values[old] for s, old in row]).sum(0) for row in pairs])
            sizes = [sum(sizes[old] for old in group) for group in joined]
            anchors = [anchors[old] for old in stands]
        done.append((rows, anchors, sizes))
    kept = tuple(len(rows) for rows, _, _ in done)
    width = max(kept)
    result = Merge(
        torch.full(metric.shape[:2], width),
        torch.zeros(metric.shape[:2]),
        torch.zeros(len(metric), width, dtype=torch.long),
        torch.zeros(len(metric), width),
        kept,
    )
    for g, (rows, anchors, sizes) in enumerate(done):
        result.anchor[g, : len(rows)], result.size[g, : len(rows)] = torch.tensor(anchors), torch.tensor(sizes)
        for place, row in enumerate(rows):
            for share, token in row:
                result.target[g, token], result.weight[g, token] = place, share
    return result


def merge_rows(x: Tensor, target: Tensor, weight: Tensor, rows: int) -> Tensor:
    sums = torch.zeros(len(x), rows, x.shape[2], dtype=torch.float64)
    for g in range(len(x)):
        for token in range(x.shape[1]):
            if target[g, token] < rows:
                sums[g, target[g, token]] += weight[g, token] * x[g, token].double()
    return sums.to(x.dtype)


def unmerge(x: Tensor, target: Tensor) -> Tensor:
    rows = x.shape[1]
    out = torch.zeros(*target.shape, x.shape[2], dtype=x.dtype)
    for g in range(len(x)):
        for token in range(target.shape[1]):
            if target[g, token] < rows:
                out[g, token] = x[g, target[g, token]]
    return out


def group_places(group: Tensor, mask: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    width = group.shape[1]
    rows = []
    for i, counts in enumerate(sizes):
        for g, count in enumerate(counts):
            places = [i * width + n for n in range(width) if mask[i, n] and group[i, n] == g]
            assert len(places) == count
            rows += [places] if places else []
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def lay_out(
    merge: Merge, rows: Tensor, places: Tensor, shape: tuple[int, int], *, raster: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.zeros(shape, dtype=torch.bool)
    tokens = torch.zeros(*shape, rows.shape[2], dtype=rows.dtype)
    into = torch.full(shape, -1)
    for g, count in enumerate(merge.counts):
        anchors = merge.anchor[g, :count].tolist()
        seats = [divmod(int(places[g, each]), shape[1]) for each in (anchors if raster else sorted(anchors))]
        for row, (item, token) in enumerate(seats):
            kept[item, token], tokens[item, token] = True, rows[g, row]
        for place, target in zip(places[g].tolist(), merge.target[g].tolist(), strict=True):
            if target < merge.anchor.shape[1]:
                into[divmod(place, shape[1])] = seats[target][1]
    return kept, tokens, into


# --- cases: frames or crops of one size and of different sizes
def _groups(size: Size, width: int = 24) -> tuple[Tensor, list[int]]:
    counts = [7, 4, 1, 2, 9] if size == "small" else [196] * 4
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(counts), max(counts), width, generator=generator), counts


def _match(size: Size) -> dict[str, Any]:
    metric, counts = _groups(size)
    return {"metric": metric, "counts": torch.tensor(counts), "protected": 1}


def _step(size: Size) -> dict[str, Any]:
    metric, counts = _groups(size)
    return {"metric": metric, "counts": counts, "merged": [n // 3 for n in counts]}


def _merge(size: Size) -> dict[str, Any]:
    metric, counts = _groups(size)
    return {"metric": metric, "counts": counts, "plans": [ops.merge_plan(n, -(-n // 4)) for n in counts]}


def _rows(size: Size) -> dict[str, Any]:
    x, counts = _groups(size, 16 if size == "small" else 256)
    merge = ops.bipartite_merge(x, counts, [ops.merge_plan(n, -(-n // 4)) for n in counts])
    return {"x": x, "target": merge.target, "weight": merge.weight, "rows": merge.anchor.shape[1]}


def _back(size: Size) -> dict[str, Any]:
    given = _rows(size)
    return {"x": ops.merge_rows(**given), "target": given["target"]}


def _places(size: Size) -> dict[str, Any]:
    items, tokens, groups = (2, 11, 3) if size == "small" else (4, 6272, 32)
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(groups, (items, tokens), generator=generator)
    mask = torch.arange(tokens) < torch.tensor([tokens - i for i in range(items)])[:, None]
    sizes = [[int((group[i][mask[i]] == g).sum()) for g in range(groups)] for i in range(items)]
    return {"group": group, "mask": mask, "sizes": sizes}


def _seats(size: Size) -> dict[str, Any]:
    given = _places(size)
    places = ops.group_places(**given)
    x = torch.randn(given["group"].numel(), 8, generator=torch.Generator().manual_seed(0))[places]
    counts = [count for row in given["sizes"] for count in row]
    merge = ops.bipartite_merge(x, counts, [ops.merge_plan(n, -(-n // 3)) for n in counts])
    rows = ops.merge_rows(x, merge.target, merge.weight, merge.anchor.shape[1])
    return {"merge": merge, "rows": rows, "places": places, "shape": tuple(given["group"].shape)}


CASES = (
    OpCase(ops.best_match, best_match, _match, 1e-5),
    OpCase(ops.merge_step, merge_step, _step),
    OpCase(ops.bipartite_merge, bipartite_merge, _merge, 1e-5),
    OpCase(ops.merge_rows, merge_rows, _rows, 1e-5),
    OpCase(ops.unmerge, unmerge, _back),
    OpCase(ops.group_places, group_places, _places),
    OpCase(ops.lay_out, lay_out, _seats),
)
