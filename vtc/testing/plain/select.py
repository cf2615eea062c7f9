"""References for `vtc.ops.select`: sort, share out and gather one row after the other."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vtc.ops.select import (
    apportion,
    evenly,
    front_pack,
    group_sizes,
    in_groups,
    left_pack,
    out_of_groups,
    outliers,
    put_rows,
    take_last,
    take_rows,
    top_k,
)
from vtc.testing.plain import OpCase, Size


def _best(scores: list[float], allowed: list[int], keep: int) -> list[int]:
    """The `keep` best of the allowed places, higher score first, then lower place."""
    return sorted(allowed, key=lambda place: (-scores[place], place))[: max(0, keep)]


def _marks(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([[place in set(row) for place in range(width)] for row in rows])


def plain_top_k(scores: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    """The best of every row."""
    rows = [
        _best(row, [place for place, real in enumerate(real) if real], count)
        for row, real, count in zip(scores.tolist(), mask.tolist(), keep.tolist(), strict=True)
    ]
    return _marks(rows, scores.shape[1])


def plain_evenly(mask: Tensor, count: Tensor) -> Tensor:
    """The entries in whose stretch of the unmasked ones the middle of a `count`-th part lies."""
    rows = []
    for item, wanted in enumerate(count.tolist()):
        real = [place for place, there in enumerate(mask[item].tolist()) if there]
        middles = [Fraction(2 * part + 1, 2 * wanted) * len(real) for part in range(wanted)]
        rows.append([real[math.ceil(middle) - 1] for middle in middles])
    return _marks(rows, mask.shape[1])


def plain_outliers(values: Tensor, mask: Tensor) -> Tensor:
    """What lies above the upper fence of a box plot; the largest where nothing does."""
    rows = []
    for row, real in zip(values.tolist(), mask.tolist(), strict=True):
        places = [place for place, there in enumerate(real) if there]
        ordered = sorted(row[place] for place in places)
        low, high = (_quantile(ordered, Fraction(part, 4)) for part in (1, 3))
        many = sum(row[place] > high + 1.5 * (high - low) for place in places)
        rows.append(_best(row, places, max(1, many)))
    return _marks(rows, values.shape[1])


def _quantile(ordered: list[float], share: Fraction) -> float:
    at = share * (len(ordered) - 1)
    low = ordered[math.floor(at)]
    return low + float(at - math.floor(at)) * (ordered[math.ceil(at)] - low)


def _largest_remainders(total: int, sizes: list[int]) -> list[int]:
    exact = [Fraction(size * total, max(1, sum(sizes))) for size in sizes]
    share = [math.floor(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda group: (share[group] - exact[group], group))
    for group in order[: total - sum(share)]:
        share[group] += 1
    return share


def plain_apportion(total: Tensor, sizes: Tensor) -> Tensor:
    """Largest remainders in exact fractions."""
    return torch.tensor([_largest_remainders(*row) for row in zip(total.tolist(), sizes.tolist(), strict=True)])


def plain_group_sizes(group: Tensor, groups: int, mask: Tensor) -> Tensor:
    """Count the members of each group."""
    rows = [
        [g for g, real in zip(*row, strict=True) if real] for row in zip(group.tolist(), mask.tolist(), strict=True)
    ]
    return torch.tensor([[row.count(g) for g in range(groups)] for row in rows])


def plain_left_pack(kept: Tensor, length: int) -> Tensor:
    """Dropped places, then kept ones, of each row; its last `length` entries."""
    rows = [[p for p, k in enumerate(row) if not k] + [p for p, k in enumerate(row) if k] for row in kept.tolist()]
    return torch.tensor([row[len(row) - length :] for row in rows])


def plain_front_pack(kept: Tensor, length: int) -> Tensor:
    """Kept places, then dropped ones, of each row; its first `length` entries."""
    rows = [[p for p, k in enumerate(row) if k] + [p for p, k in enumerate(row) if not k] for row in kept.tolist()]
    return torch.tensor([row[:length] for row in rows])


def plain_take_rows(x: Tensor, index: Tensor) -> Tensor:
    """One row after the other."""
    return torch.stack([torch.stack([x[b, place] for place in row]) for b, row in enumerate(index.tolist())])


def plain_take_last(x: Tensor, index: Tensor) -> Tensor:
    """One entry after the other."""
    found = x.new_empty(*x.shape[:-2], *index.shape)
    for b, row in enumerate(index.tolist()):
        for slot, place in enumerate(row):
            found[..., b, slot] = x[..., b, place]
    return found


def plain_put_rows(background: Tensor, index: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """Write one row after the other to its place."""
    full = background.clone()
    for b, slot in where.nonzero().tolist():
        full[b, index[b, slot]] = rows[b, slot]
    return full


def _ranked(size: Size, groups: int | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rows, width = (3, 11) if size == "small" else (8, 2880)
    mask = torch.rand(rows, width, generator=generator) < 0.9
    scores = torch.randint(width // 3, (rows, width), generator=generator).float()  # ties everywhere
    given: dict[str, Any] = {"scores": scores, "keep": mask.sum(1) // 4, "mask": mask}
    if groups is not None:
        given |= {"group": torch.randint(groups, (rows, width), generator=generator), "groups": groups}
    return given


def _grouped(size: Size) -> dict[str, Any]:
    given = _ranked(size, groups=5)
    return {name: given[name] for name in ("group", "groups", "mask")}


def plain_out_of_groups(values: Tensor, place: Tensor, real: Tensor, length: int, empty: float = 0) -> Tensor:
    """Write one value after the other to its place."""
    full = values.new_full((len(values), length), empty)
    for item, group, slot in real.nonzero().tolist():
        full[item, place[item, group, slot]] = values[item, group, slot]
    return full


def _placed(size: Size) -> dict[str, Any]:
    given = _grouped(size)
    place, real = in_groups(**given, width=int(group_sizes(**given).max()))
    values = torch.rand(place.shape, generator=torch.Generator().manual_seed(3))
    return {"values": values, "place": place, "real": real, "length": given["mask"].shape[1], "empty": -1.0}


def _shares(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    rows, groups = (3, 4) if size == "small" else (500, 64)
    sizes = torch.randint(0, 600, (rows, groups), generator=generator)
    return {"total": sizes.sum(1) // 3, "sizes": sizes}


def _skewed(size: Size) -> dict[str, Any]:
    given = _ranked(size)
    return {"values": given["scores"] ** 3, "mask": given["mask"]}


def _packed(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    rows, width = (3, 9) if size == "small" else (8, 20000)
    kept = torch.rand(rows, width, generator=generator) < 0.4
    return {"kept": kept, "length": int(kept.sum(1).max())}


def _gathered(size: Size, *, last: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(6)
    rows, width, kept = (2, 7, 3) if size == "small" else (8, 4000, 2000)
    shape = (3, rows, width) if last else (rows, width, 16)
    index = torch.randint(width, (rows, kept), generator=generator)
    return {"x": torch.randn(shape, generator=generator), "index": index}


def _put(size: Size) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    rows, width, kept = (2, 7, 4) if size == "small" else (8, 4000, 2000)
    index = torch.rand(rows, width, generator=generator).argsort(1)[:, :kept]
    return {
        "background": torch.randn(rows, width, 16, generator=generator),
        "index": index,
        "where": torch.rand(rows, kept, generator=generator) < 0.7,
        "rows": torch.randn(rows, kept, 16, generator=generator),
    }


CASES = (
    OpCase(top_k, plain_top_k, _ranked),
    OpCase(evenly, plain_evenly, lambda size: {"mask": _ranked(size)["mask"], "count": _ranked(size)["keep"]}),
    OpCase(outliers, plain_outliers, _skewed),
    OpCase(apportion, plain_apportion, _shares),
    OpCase(group_sizes, plain_group_sizes, _grouped),
    OpCase(out_of_groups, plain_out_of_groups, _placed),
    OpCase(left_pack, plain_left_pack, _packed),
    OpCase(front_pack, plain_front_pack, _packed),
    OpCase(take_rows, plain_take_rows, _gathered),
    OpCase(take_last, plain_take_last, lambda size: _gathered(size, last=True)),
    OpCase(put_rows, plain_put_rows, _put),
)
