"""Greedy choice of diverse tokens: one token per step, the choice for fewer tokens is the beginning of that for more.

All items walk together; an item that is to keep fewer tokens than its neighbours ignores the end of its order. A step
costs one product of the tokens with a vector, [N, D] x [D]; the N x N similarities never exist. Similarity is the
cosine, in float32; features of half precision and a copy with unit length are all that is held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.checks import numbers
from vtc.ops.select import TIE, first_best

CHUNK = 4096
PAIRS = 2**24
RANK = 1e-5


def best(scores: Tensor, mask: Tensor) -> Tensor:
    """[I] place of the highest score among the unmasked of each row, the lower one of equals; [I, N] -> [I].

    >>> best(torch.tensor([[1.0, 3.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])).tolist()
    [1]
    """
    return first_best(numbers(scores, mask).masked_fill(~mask, -torch.inf))


def chosen(order: Tensor, keep: Tensor, mask: Tensor) -> Tensor:
    """Mark the first `keep` [I] tokens of an order [I, K]; mask: [I, N], False is never kept. Returns bool [I, N].

    >>> chosen(torch.tensor([[2, 0, 1]]), torch.tensor([2]), torch.ones(1, 4, dtype=torch.bool)).int().tolist()
    [[1, 0, 1, 0]]
    """
    taken = torch.arange(order.shape[1], device=order.device) < keep[:, None]
    # Orders repeat a place once an item has run out of tokens, so the marks are counted, not written.
    return mask & (torch.zeros_like(mask, dtype=torch.long).scatter_add(1, order, taken.long()) > 0)


def total(features: Tensor, mask: Tensor) -> Tensor:
    """Sum of the unmasked tokens: [I, N, D], [I, N] -> float32 [I, D]. Streams over the tokens."""
    result = features.new_zeros(len(features), 1, features.shape[2], dtype=torch.float32)
    for x, real in zip(torch.split(features.detach(), CHUNK, 1), torch.split(mask, CHUNK, 1), strict=True):
        result += torch.bmm(real[:, None].float(), x.float())
    return result[:, 0]


def alignment(features: Tensor, direction: Tensor) -> Tensor:
    """Product of each token, scaled to unit length, with its item's direction [I, D]; float32 [I, N].

    The cosine where the direction has unit length; the mean of several cosines where it is the mean of several units.
    """
    result = features.new_empty(features.shape[:2], dtype=torch.float32)
    for x, part in zip(torch.split(features.detach(), CHUNK, 1), torch.split(result, CHUNK, 1), strict=True):
        x = x.float()
        part.copy_(_products(x, direction) / x.norm(dim=2).clamp(min=1e-12))
    return result


def cosine_to_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Cosine between each token and the mean of its item's tokens (not of unit length); [I, N, D] -> float32 [I, N]."""
    return alignment(features, torch.nn.functional.normalize(total(features, mask), dim=1))


def max_sum(features: Tensor, start: Tensor, steps: int, mask: Tensor) -> Tensor:
    """Greedy max-sum diversification: always the token whose cosines to all chosen ones have the lowest sum.

    features: [I, N, D]. start: [I] first token. mask: [I, N] bool, False is never chosen. Ties go to the lower index.
    Returns [I, steps] token places in the order of choice; behind the number of an item's tokens they mean nothing.

    >>> x = torch.tensor([[[1.0, 0.0], [-1.7, 1.0], [0.0, 2.0], [3.0, 0.3]]])
    >>> max_sum(x, torch.tensor([0]), 3, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[0, 1, 3]]
    """
    return _walk(_unit(numbers(features, mask)), start, steps, mask, farthest=False)


def k_center(features: Tensor, start: Tensor, steps: int, mask: Tensor) -> Tensor:
    """Greedy k-center: always the token that is farthest from its nearest chosen one; arguments as in `max_sum`.

    >>> x = torch.tensor([[[1.0, 0.0], [-1.7, 1.0], [0.0, 2.0], [3.0, 0.3]]])
    >>> k_center(x, torch.tensor([0]), 3, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[0, 1, 2]]
    """
    return _walk(_unit(numbers(features, mask)), start, steps, mask, farthest=True)


def most_isolated(features: Tensor, mask: Tensor) -> Tensor:
    """[I] the token of each item whose nearest other token is farthest away, by cosine; the lower one of equals.

    Arguments as in `max_sum`. Streams over the tokens, N^2 D operations in all.
    """
    unit = _unit(numbers(features, mask))
    items, length = mask.shape
    steps = torch.arange(length, device=mask.device)
    nearest = []
    for some in torch.split(steps, max(1, PAIRS // (items * length))):
        cosine = unit[:, some] @ unit.transpose(1, 2)
        other = mask[:, None, :] & (steps != some[:, None])
        nearest.append(cosine.masked_fill(~other, -torch.inf).amax(2))
    rated = torch.where(mask, torch.cat(nearest, dim=1), torch.inf)
    # Two that are each other's nearest are equals, whichever of them the rounding of their product favours.
    return first_best(-rated)


def greedy_map(features: Tensor, quality: Tensor, steps: int, mask: Tensor) -> Tensor:
    """Greedy mode of a determinantal point process: always the token that raises det(L of the chosen) most.

    L_ij = q_i cos(x_i, x_j) q_j for features [I, N, D] and quality q [I, N]. L has rank D at most: tokens that the
    chosen ones span (less than RANK of their squared length is left) come last, the highest quality first. The chosen
    directions are kept as an orthonormal basis, [D, D] at most, instead of the Cholesky rows [steps, N]. Returns the
    order as `max_sum` does.
    """
    unit = _unit(numbers(features, mask))
    quality = numbers(quality, mask).detach().float().nan_to_num()
    item = torch.arange(len(unit), device=unit.device)
    left, residual, worth = mask, unit.norm(dim=2).square(), quality.square()
    basis = unit.new_zeros(len(unit), min(steps, unit.shape[2]), unit.shape[2])
    order = item.new_zeros(len(unit), steps)
    for step in range(steps):
        new = left & (residual > RANK)
        some = new.any(1, keepdim=True) & (step < basis.shape[1])
        gain = torch.where(some, worth * residual, quality)
        gain = gain.masked_fill(~torch.where(some, new, left), -torch.inf)
        # A residual is known to about TIE, so that a gain is known to TIE times the square of its quality.
        token = first_best(gain, TIE * worth.gather(1, gain.argmax(1, keepdim=True)))
        order[:, step] = token
        left = left.scatter(1, token[:, None], False)
        if step < basis.shape[1]:
            known, direction = basis[:, :step], unit[item, token]
            for _ in range(2):  # once more for what rounding left of the known directions
                direction = direction - torch.bmm(_products(known, direction)[:, None], known)[:, 0]
            direction = torch.nn.functional.normalize(direction, dim=1) * some
            basis[:, step] = direction
            residual = residual - _products(unit, direction).square()
    return order


def _walk(unit: Tensor, start: Tensor, steps: int, mask: Tensor, *, farthest: bool) -> Tensor:
    """Both rules: the next token has the lowest sum (or the lowest maximum) of cosines to those before it."""
    item = torch.arange(len(unit), device=unit.device)
    rated = torch.where(mask, -torch.inf if farthest else 0.0, torch.inf)
    order = start.new_zeros(len(unit), steps)
    token = start
    for step in range(steps):
        if step:
            token = first_best(-rated, TIE if farthest else TIE * step)
        order[:, step] = token
        cosine = _products(unit, unit[item, token])
        rated = torch.maximum(rated, cosine) if farthest else rated + cosine
        rated = rated.scatter(1, token[:, None], torch.inf)
    return order


def _products(unit: Tensor, direction: Tensor) -> Tensor:
    """[I, N, D], [I, D] -> [I, N]. A row times a matrix: on CPUs eight times as fast as the matrix times a column."""
    return torch.bmm(direction[:, None, :], unit.transpose(1, 2))[:, 0]


def _unit(features: Tensor) -> Tensor:
    """A float32 copy scaled to unit length; zero vectors stay zero. Scaled in place, so that there is one copy only."""
    unit = features.detach().to(torch.float32, copy=True)
    # A NaN would win every comparison, be chosen again and again, and leave an item short of tokens.
    return unit.div_(unit.norm(dim=2, keepdim=True).clamp(min=1e-12)).nan_to_num_(0.0)
