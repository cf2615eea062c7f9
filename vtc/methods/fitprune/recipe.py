"""How many tokens may leave behind each layer, where what leaves there has at most a share of its attention's mass.

Letters: A shares, L layers, I items, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtc.method.schedule import Profiles

STEPS = 100
"""Shares of the mass that are tried lie so many to 1 apart."""
ROUNDING = 1e-9
"""Share of a layer's mass that adding it up in another order may move."""


class Recipe(nn.Module):
    """The share of the tokens that is left behind every layer but the last, for each share of mass that may go.

    left: [STEPS + 1, layers - 1], one row for 0, 1 / STEPS, ... 1; falls along both axes. profiles: the same on the
    host.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.ones(STEPS + 1, layers - 1), requires_grad=False)
        self.profiles = Profiles(())


def left_behind(own: Tensor, cross: Tensor, mask: Tensor, steps: int = STEPS) -> Tensor:
    """Tokens left behind each layer where every layer may lose a share of its mass: [steps + 1, L, I], from 0 to 1.

    own, cross: [L, I, N] what each token receives from the image and from the text behind it in the unpruned model.
    mask: [I, N] bool. Layer by layer, of the tokens still there a set is taken that is as large as possible while it
    has at most the share of what all tokens receive in that layer of the unpruned model; one by `own` and one by
    `cross`. What lies in both leaves behind the layer.

    >>> own = cross = torch.tensor([[[0.1, 0.2, 0.7]]])
    >>> left_behind(own, cross, torch.ones(1, 3, dtype=torch.bool), 4)[:, 0, 0].tolist()
    [3, 2, 1, 1, 0]
    """
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=mask.device)[:, None, None]
    there = mask.expand(steps + 1, -1, -1)
    counts = []
    for received in zip(own, cross, strict=True):
        out = there
        for values in received:
            values = values.double().masked_fill(~mask, 0)
            total = values.sum(1, keepdim=True)
            rising, order = torch.where(there, values, torch.inf).sort(dim=2, stable=True)
            fits = rising.cumsum(2) <= (share + ROUNDING) * total
            out = out & torch.zeros_like(out).scatter(2, order, fits)
        there = there & ~out
        counts.append(there.sum(2))
    return torch.stack(counts, 1)


def recipe(counts: Tensor, tokens: Tensor) -> Tensor:
    """[A, L] mean share of the tokens left, from the counts [A, L, I] of items that had `tokens` [I].

    The first row, of no loss, leaves all. Made to fall along both axes: on the way a larger loss may keep a token that
    a smaller one does not.

    >>> recipe(torch.tensor([[[4, 8]], [[1, 4]], [[2, 4]]]), torch.tensor([4, 8])).tolist()
    [[1.0], [0.375], [0.375]]
    """
    mean = (counts.double() / tokens).mean(2).cummin(0).values.cummin(1).values
    return torch.cat([torch.ones_like(mean[:1]), mean[1:]])
