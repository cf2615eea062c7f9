"""Order and place: sorting by several keys, the inverse of an order, places within groups. Rows [I, N] side by side.

All sorts are stable, so that equals stay in the order of their index.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_by(*keys: Tensor, best: Tensor | None = None) -> Tensor:
    """The order by the first key, among equals by the second, and so on, all rising; last by `best`, falling. [I, N].

    >>> order_by(torch.tensor([[1, 0, 1, 0]]), best=torch.tensor([[0.1, 0.2, 0.3, 0.2]])).tolist()
    [[1, 3, 2, 0]]
    """
    order = None if best is None else best.argsort(dim=1, descending=True, stable=True)
    for key in reversed(keys):
        key = key.to(torch.uint8) if key.dtype == torch.bool else key
        sort = key if order is None else key.gather(1, order)
        index = sort.argsort(dim=1, stable=True)
        order = index if order is None else order.gather(1, index)
    assert order is not None, "an order needs a key"
    return order


def inverse(order: Tensor) -> Tensor:
    """The place that every entry has in an order [I, N].

    >>> inverse(torch.tensor([[2, 0, 1]])).tolist()
    [[1, 2, 0]]
    """
    return torch.empty_like(order).scatter_(1, order, _places(order))


def rank_in_group(group: Tensor, *keys: Tensor, best: Tensor | None = None) -> Tensor:
    """[I, N] place of every entry among those of its group, ordered by keys and `best` as in `order_by`.

    >>> rank_in_group(torch.tensor([[7, 2, 7, 2]]), best=torch.tensor([[0.1, 0.9, 0.3, 0.2]])).tolist()
    [[1, 0, 0, 1]]
    """
    order = order_by(group, *keys, best=best)
    place = _places(order)
    begin = torch.where(run_starts(group.gather(1, order)), place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, place - begin)


def dense_rank(values: Tensor, group: Tensor, tolerance: float) -> Tensor:
    """[I, N] number of the distinct smaller values in an entry's group: the grid line that a coordinate lies on.

    Values that differ by at most `tolerance` from their neighbour in order are one line. group: [I, N] whole numbers.

    >>> dense_rank(torch.tensor([[0.5, 4.5, 0.5, 2.5, 2.5]]), torch.tensor([[0, 0, 0, 0, 1]]), 0.01).tolist()
    [[0, 2, 0, 1, 0]]
    """
    order = order_by(group, values)
    value, starts = values.gather(1, order), run_starts(group.gather(1, order))
    line = torch.zeros_like(order)
    line[:, 1:] = ((value[:, 1:] - value[:, :-1]).abs() > tolerance) & ~starts[:, 1:]
    line = line.cumsum(1)
    first = torch.where(starts, line, 0).cummax(1).values
    return torch.empty_like(line).scatter_(1, order, line - first)


def run_starts(ordered: Tensor) -> Tensor:
    """Where another value begins in rows [I, N] whose equal entries stand side by side; bool [I, N]."""
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return starts


def _places(order: Tensor) -> Tensor:
    return torch.arange(order.shape[1], device=order.device).expand_as(order)
