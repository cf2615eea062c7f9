"""Greedy choice of diverse tokens: one token per step, the choice for fewer tokens is the beginning of that for more.

All items walk together; an item that is to keep fewer tokens than its neighbours ignores the end of its order. A step
costs one product of the tokens with a vector, [N, D] x [D], or reads a row of the N x N similarities where these are
small enough to be held (`vtc.ops.similarity`) and many steps use them; as many items at a time are then taken as fit,
and on a GPU one kernel walks all steps (`vtc.ops.kernels`). Similarity is the cosine, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtc.ops import kernels, similarity
from vtc.ops.checks import numbers
from vtc.ops.select import TIE, first_best

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


def max_sum(features: Tensor, start: Tensor, steps: int, mask: Tensor) -> Tensor:
    """Greedy max-sum diversification: always the token whose cosines to all chosen ones have the lowest sum.

    features: [I, N, D]. start: [I] first token. mask: [I, N] bool, False is never chosen. Ties go to the lower index.
    Returns [I, steps] token places in the order of choice; behind the number of an item's tokens they mean nothing.

    >>> x = torch.tensor([[[1.0, 0.0], [-1.7, 1.0], [0.0, 2.0], [3.0, 0.3]]])
    >>> max_sum(x, torch.tensor([0]), 3, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[0, 1, 3]]
    """
    return _walk(numbers(features, mask), start, steps, mask, farthest=False)


def k_center(
    features: Tensor, start: Tensor | None, steps: int, mask: Tensor, *, worth: Tensor | None = None
) -> Tensor:
    """Greedy k-center: always the token that is farthest from its nearest chosen one; arguments as in `max_sum`.

    start: None begins with the token of `most_isolated`. worth: [I, N], at least 0, what each token's distance, one
    minus the cosine, is multiplied by, the first one's too.

    >>> x = torch.tensor([[[1.0, 0.0], [-1.7, 1.0], [0.0, 2.0], [3.0, 0.3]]])
    >>> k_center(x, torch.tensor([0]), 3, torch.ones(1, 4, dtype=torch.bool)).tolist()
    [[0, 1, 2]]
    """
    return _walk(numbers(features, mask), start, steps, mask, farthest=True, worth=worth)


def most_isolated(features: Tensor, mask: Tensor) -> Tensor:
    """[I] the token of each item whose nearest other token is farthest away, by cosine; the lower one of equals.

    Arguments as in `max_sum`. Streams over the tokens, N^2 D / 2 multiplications in all.
    """
    return _isolated(similarity.Cosines(numbers(features, mask), steps=0), mask)


def greedy_map(features: Tensor, quality: Tensor, steps: int, mask: Tensor) -> Tensor:
    """Greedy mode of a determinantal point process: always the token that raises det(L of the chosen) most.

    L_ij = q_i cos(x_i, x_j) q_j for features [I, N, D] and quality q [I, N]. L has rank D at most: tokens that the
    chosen ones span (less than RANK of their squared length is left) come last, the highest quality first. The chosen
    directions are kept as an orthonormal basis, [D, D] at most, instead of the Cholesky rows [steps, N]. Returns the
    order as `max_sum` does.
    """
    cosines = similarity.Cosines(numbers(features, mask), steps=0)
    quality = numbers(quality, mask).detach().float().nan_to_num()
    rows, scale = cosines.rows, cosines.scale
    item = torch.arange(len(rows), device=rows.device)
    left, residual, worth = mask, (scale > 0).float(), quality.square()
    basis = rows.new_zeros(len(rows), min(steps, rows.shape[2]), rows.shape[2])
    order = item.new_zeros(len(rows), steps)
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
            known, direction = basis[:, :step], cosines.direction(token)
            for _ in range(2):  # once more for what rounding left of the known directions
                direction = direction - torch.bmm(similarity.products(known, direction)[:, None], known)[:, 0]
            direction = torch.nn.functional.normalize(direction, dim=1) * some
            basis[:, step] = direction
            residual = residual - (similarity.products(rows, direction) * scale).nan_to_num(0.0).square()
    return order


def _walk(
    features: Tensor,
    start: Tensor | None,
    steps: int,
    mask: Tensor,
    *,
    farthest: bool,
    worth: Tensor | None = None,
) -> Tensor:
    """Both rules: the next token has the lowest sum (or the lowest maximum) of cosines to those before it."""
    items, length = mask.shape
    fit = similarity.STORE // max(1, length * length)
    quick = worth is None and kernels.usable(features)
    if (quick or features.device.type == "cpu") and 0 < fit < items and length <= similarity.PAYS * steps:
        given, masks = torch.split(features, fit), torch.split(mask, fit)
        firsts, worths = ([None] * len(given) if each is None else torch.split(each, fit) for each in (start, worth))
        parts = zip(given, firsts, masks, worths, strict=True)
        return torch.cat([_walk(x, first, steps, real, farthest=farthest, worth=w) for x, first, real, w in parts])
    cosines = similarity.Cosines(features, steps)
    token = _isolated(cosines, mask, worth) if start is None else start
    if quick and cosines.all is not None:
        return kernels.walk(cosines.all, mask, token, steps, TIE, farthest=farthest)
    rated = torch.where(mask, -torch.inf if farthest else 0.0, torch.inf)
    order = token.new_zeros(items, steps)
    for step in range(steps):
        if step and worth is None:
            token = _last_best(rated, TIE if farthest else TIE * step)
        elif step and worth is not None:
            token = _worthiest(rated, worth)
        order[:, step] = token
        cosine = cosines.to(token)
        rated = torch.maximum(rated, cosine) if farthest else rated + cosine
        rated = rated.scatter_(1, token[:, None], torch.inf)
    return order


def _last_best(rated: Tensor, slack: float) -> Tensor:
    """[I] lowest index of a value [I, N] that is at most `slack` above the lowest."""
    # The maximum of floats is found many times as fast as that of bytes.
    return (rated <= rated.amin(1, keepdim=True) + slack).float().max(1).indices


def _worthiest(rated: Tensor, worth: Tensor) -> Tensor:
    """[I] lowest index of the largest ``worth (1 - rated)``, [I, N] each; what is rated inf is never the answer."""
    gain = (worth * (1 - rated)).masked_fill(rated == torch.inf, -torch.inf)
    return first_best(gain, TIE * worth.gather(1, gain.argmax(1, keepdim=True)))


def _isolated(cosines: similarity.Cosines, mask: Tensor, worth: Tensor | None = None) -> Tensor:
    """See `most_isolated`; worth: as in `k_center`."""
    nearest = cosines.scale.new_full(mask.shape, -torch.inf)
    absent = torch.where(mask, 0.0, -torch.inf)  # to add it is several times as fast as to fill in a mask
    if cosines.all is not None:
        # Neither a token's cosine to itself nor one to what is masked is read again by `k_center`.
        cosines.all.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        nearest = cosines.all.add_(absent[:, None]).amax(2)
    else:
        for some, others, cosine in cosines.blocks(max(1, min(1024, int((PAIRS / len(mask)) ** 0.5)))):
            if some == others:
                cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            cosine = cosine.add_(absent[:, None, others])
            nearest[:, some] = torch.maximum(nearest[:, some], cosine.amax(2))
            if some != others:
                cosine = cosine.add_(absent[:, some, None])
                nearest[:, others] = torch.maximum(nearest[:, others], cosine.amax(1))
    # Two that are each other's nearest are equals, whichever of them the rounding of their product favours.
    if worth is None:
        return first_best(torch.where(mask, -nearest, -torch.inf))
    return _worthiest(torch.where(mask, nearest.clamp(min=-1), torch.inf), worth)
