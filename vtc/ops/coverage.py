"""Greedy coverage: one token per step, the one that makes all tokens resemble a chosen one most."""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops.blocks import at_once
from vtc.ops.checks import numbers
from vtc.ops.select import TIE, first_best

STORE = 2**26
"""Similarities held at once (256 MiB); where one item has more, every step computes them again."""


def coverage(features: Tensor, worth: Tensor, steps: int, mask: Tensor) -> Tensor:
    """Greedy facility location, each token counted by its worth.

    With cosines C_uj and ``c_u = max(0, max C_uj over the chosen j)``, always the token of largest ``worth_j
    sum_u max(0, C_uj - c_u)``; ties go to the lower index. features: [I, N, D]. worth: [I, N], at least 0. mask: [I, N]
    bool, False is neither chosen nor covered. Returns [I, steps] token places in the order of choice; behind the number
    of an item's tokens they mean nothing.

    >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]]])
    >>> coverage(x, torch.ones(1, 4), 2, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[2, 3]]
    """
    items, length = mask.shape
    fit = max(1, STORE // max(1, length * length))
    if items > fit:
        parts = zip(*(torch.split(each, fit) for each in (features, worth, mask)), strict=True)
        return torch.cat([coverage(x, value, steps, real) for x, value, real in parts])
    unit = torch.nn.functional.normalize(numbers(features, mask).detach().float(), dim=2).nan_to_num(0.0)
    held = torch.bmm(unit, unit.transpose(1, 2)) if length * length <= STORE else None
    item, size = torch.arange(items, device=mask.device), at_once(items * length, mask.device)
    covered = torch.where(mask, 0.0, torch.inf)  # what is not there cannot gain
    left, order = mask, item.new_zeros(items, steps)
    for step in range(steps):
        gain = torch.zeros_like(covered)
        for first in range(0, length, size):
            some = slice(first, first + size)
            like = torch.bmm(unit[:, some], unit.transpose(1, 2)) if held is None else held[:, some]
            gain += (like - covered[:, some, None]).relu_().sum(1)
        rated = (gain * numbers(worth, mask)).masked_fill(~left, -torch.inf)
        token = first_best(rated, TIE * rated.amax(1, keepdim=True).clamp(min=0))
        order[:, step] = token
        left = left.scatter(1, token[:, None], False)
        like = torch.bmm(unit, unit[item, token][..., None])[..., 0] if held is None else held[item, token]
        covered = torch.maximum(covered, like)
    return order
